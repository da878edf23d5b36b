"""Pictures of statistics."""


def plot_histograms(path, histograms, rows):
    pass


def plot_statistics(path, rows, sens):
    pass
