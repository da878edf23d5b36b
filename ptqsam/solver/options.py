"""What the command line asks the loop for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """What the command line asks for beside the model and the recipe.

    Attributes:
        model: name of the model config, for reports.
        quant: name of the recipe, for reports.
        seed: reported with the results.
        limit: evaluate only the first so many images.
        eval_fp: evaluate the floating-point model as well.
        resume: go on from what an earlier run left in the work dir.
        load: folder of a packed checkpoint to evaluate, in place of calibrating.
        show_dir: folder for mask pictures.
        cache_dir: folder for detector boxes and shared work.
        share_work: take from other runs what this one needs, too, and leave it for them.
    """

    model: str
    quant: str
    seed: int
    limit: int | None = None
    eval_fp: bool = False
    resume: bool = False
    load: str | None = None
    show_dir: str | None = None
    cache_dir: str = 'work_dirs/cache'
    share_work: bool = False
