"""What the activation cache gives back, what it costs, and what is left when it or its process ends."""

import errno
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptqsam.errors import ConfigError
from ptqsam.reconstruction.cache import ActivationCache, entry_bytes

STORES = ['device', 'host', 'disk']
DTYPES = [torch.float32, torch.bfloat16]
KINDS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


@pytest.fixture(params=STORES)
def store(request) -> str:
    return request.param


def make(folder: Path, store: str = 'host', dtype: torch.dtype = torch.float32, device: str = 'cpu') -> ActivationCache:
    return ActivationCache(store, device, dtype, folder / 'cache')


def expected(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype).float() if tensor.is_floating_point() else tensor


def assert_same(tensors, others) -> None:
    """Same shapes, dtypes and bits; any NaN is as good as another, conversions choose among them."""
    assert len(tensors) == len(others)
    for tensor, other in zip(tensors, others, strict=True):
        assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
        known = ~other.isnan()
        assert torch.equal(~tensor.isnan(), known)
        assert torch.equal(tensor[known], other[known])
        assert not tensor.is_floating_point() or torch.equal(tensor[known].signbit(), other[known].signbit())


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any shape with up to 4 axes, some of them repeated by value or by stride, any layout, special values."""
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    repeated = [draw(st.sampled_from(['no', 'no', 'value', 'stride'])) for _ in shape]
    base = [1 if how != 'no' and size else size for size, how in zip(shape, repeated, strict=True)]
    torch.manual_seed(draw(st.integers(0, 1000)))
    tensor = (4 * torch.randn(base)).to(draw(st.sampled_from(KINDS)))
    if tensor.is_floating_point() and tensor.numel() and draw(st.booleans()):
        tensor.flatten()[-1] = draw(st.sampled_from([float('nan'), float('inf'), -0.0]))
    for axis, (size, how) in enumerate(zip(shape, repeated, strict=True)):
        if how == 'value' and size:
            tensor = tensor.repeat_interleave(size, axis)
    tensor = tensor.expand(shape)
    return tensor.movedim(0, -1) if tensor.ndim > 1 and draw(st.booleans()) else tensor


@pytest.mark.parametrize('store', STORES)
@pytest.mark.parametrize('dtype', DTYPES)
@given(entries=st.lists(st.lists(tensors(), min_size=1, max_size=3), min_size=1, max_size=3), again=st.booleans())
def test_round_trip(tmp_path_factory, store, dtype, entries, again):
    folder = tmp_path_factory.getbasetemp()
    cache = make(folder, store, dtype)
    entries = entries + entries[-1:] if again else entries
    before = [[tensor.clone() for tensor in entry] for entry in entries]
    for entry in entries:
        cache.append(entry)
    assert len(cache) == len(entries)
    for index, entry in enumerate(before):
        assert_same(cache.get(index), [expected(tensor, dtype) for tensor in entry])
    assert cache.nbytes <= sum(entry_bytes(entry, dtype) for entry in entries)
    assert not list((folder / 'cache').glob('*'))


@pytest.mark.parametrize('dtype', DTYPES)
def test_sizes_are_exact(tmp_path, store, dtype):
    width = dtype.itemsize
    embedding, tokens, index = torch.randn(1, 5, 7), torch.randn(3, 5, 7), torch.arange(6)
    entry = [embedding.expand(3, 5, 7), embedding.repeat(3, 1, 1), tokens, index, torch.randn(4, 1).expand(4, 9)]
    cache = make(tmp_path, store, dtype)
    size = width * (35 + 35 + 105 + 4) + 8 * 6
    assert entry_bytes(entry, dtype) == size
    cache.append(entry)
    assert cache.nbytes == size
    # only what is new is added, also where it is expanded differently, and when it comes back after something else
    cache.append([embedding.expand(8, 5, 7), embedding + 1, tokens, index, entry[4]])
    assert cache.nbytes == size + width * 35
    assert_same(cache.get(1)[:1], [expected(embedding.expand(8, 5, 7), dtype)])
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    cache.append(entry)
    assert cache.nbytes == size
    assert_same(cache.get(0), [expected(tensor, dtype) for tensor in entry])


def test_one_different_value_is_seen(tmp_path, store):
    cache = make(tmp_path, store)
    first = torch.randn(7, 1000)
    second = first.clone()
    second[3, 501] += 1
    for tensor in (first, second):
        cache.append([tensor])
    assert cache.nbytes == 2 * first.nbytes
    assert_same([*cache.get(0), *cache.get(1)], [first, second])


def test_size_of_meta_tensors():
    tensor = torch.empty(1, 4096, 256, device='meta')
    assert entry_bytes([tensor.expand(16, -1, -1), tensor.repeat(2, 1, 1)], torch.bfloat16) == 3 * 4096 * 256 * 2


def test_repeated_slices_come_back_expanded(tmp_path, store):
    cache = make(tmp_path, store)
    nan = torch.full((4, 2), float('nan'))
    zeros = torch.zeros(2, 3)
    zeros[1, 1] = -0.0
    almost = torch.zeros(5, 4, 4)
    almost[3, 2, 1] = 1e-45
    cache.append([torch.ones(1, 6).repeat(4, 1), nan, zeros, almost])
    assert [tensor.stride(0) for tensor in cache.get(0)] == [0, 0, 3, 16]
    assert_same(cache.get(0)[2:], [zeros, almost])
    assert torch.signbit(cache.get(0)[2][1, 1])


def test_entries_are_copies(tmp_path, store):
    cache = make(tmp_path, store)
    tensor = torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        other = torch.randn(3, 4)
        cache.append([tensor, other])
    kept = tensor.detach().clone()
    with torch.no_grad():
        tensor.zero_()
    first, second = cache.get(0)
    assert_same([first], [kept])
    assert not first.requires_grad
    assert not second.is_inference()


def test_whole_float32_tensors_are_not_copied_on_the_cpu(tmp_path):
    for store in ('device', 'host'):
        cache = make(tmp_path, store)
        cache.append([torch.randn(3, 4)])
        assert cache.get(0)[0].data_ptr() == cache.get(0)[0].data_ptr()
        cache.prefetch(0)
        assert not cache._ready


@pytest.mark.parametrize('dtype', DTYPES)
def test_select(tmp_path, store, dtype):
    cache = make(tmp_path, store, dtype)
    embedding, tokens = torch.randn(1, 50, 4), torch.randn(16, 50, 4)
    cache.append([embedding.expand(16, 50, 4), tokens])
    seen = []

    def rows(stored):
        seen.extend(stored)
        return [stored[0][2:6], stored[1][torch.tensor([3, 1, 3])], stored[1][:, 7]]

    chosen = cache.get(0, rows)
    assert [tensor.dtype for tensor in seen] == [dtype, dtype]
    assert seen[0].shape == (16, 50, 4) and seen[0].stride(0) == 0
    embedding, tokens = expected(embedding, dtype), expected(tokens, dtype)
    assert_same(chosen, [embedding.expand(4, 50, 4), tokens[torch.tensor([3, 1, 3])], tokens[:, 7]])
    assert chosen[0].stride(0) == 0


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='no /proc')
def test_select_reads_only_what_is_asked(tmp_path):
    cache = make(tmp_path, 'disk')
    cache.append([torch.randn(1 << 12, 1 << 12)])

    def mapped() -> int:
        """Bytes of files that this process has in memory."""
        return int(Path('/proc/self/statm').read_text().split()[2]) * os.sysconf('SC_PAGE_SIZE')

    grown = []

    def read(choose):
        def select(stored):
            before = mapped()
            chosen = choose(stored[0]).clone()
            grown.append(mapped() - before)
            return [chosen]

        return select

    cache.get(0, read(lambda stored: stored[100:104]))
    cache.get(0, read(lambda stored: stored))
    assert grown[0] < 4e6 < 60e6 < grown[1]


def test_what_was_read_outlives_the_cache(tmp_path, store):
    cache = make(tmp_path, store)
    tensor = torch.randn(300, 40)
    cache.append([tensor])
    held = cache.get(0)
    cache.clear()
    cache.append([torch.zeros(300, 40)])
    assert_same(held, [tensor])


def test_writing_to_what_was_read_leaves_the_disk_alone(tmp_path):
    cache = make(tmp_path, 'disk')
    tensor = torch.randn(30, 40)
    cache.append([tensor])
    cache.get(0)[0].zero_()
    assert_same(cache.get(0), [tensor])


OUT_OF_MEMORY = [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.\nand more'),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes."),
    RuntimeError('CUDA error: out of memory'),
    MemoryError(),
    OSError(errno.ENOSPC, 'No space left on device'),
    OSError(errno.ENOMEM, 'Cannot allocate memory'),
]
OPTIONS = [
    'cache.store',
    'device|host|disk',
    'cache.dtype=bfloat16',
    'reconstruction.max_boxes',
    'calibration.num_images',
]


@pytest.mark.parametrize('error', OUT_OF_MEMORY, ids=lambda error: f'{type(error).__name__}-{error}'[:40])
def test_out_of_memory_names_the_options(tmp_path, store, error, monkeypatch):
    cache = make(tmp_path, store)
    cache.append([torch.randn(3)])

    def fail(*_):
        raise error

    monkeypatch.setattr(cache._keeper, 'put', fail)
    with pytest.raises(ConfigError) as caught:
        cache.append([torch.randn(4)])
    message = str(caught.value)
    assert all(option in message for option in [*OPTIONS, store]) and '\n' not in message
    assert (len(cache), cache.nbytes) == (1, 12)
    with pytest.raises(ConfigError, match=r'cache\.dtype=bfloat16'):
        cache.get(0, fail)


def test_other_errors_stay_what_they_are(tmp_path, store):
    cache = make(tmp_path, store)
    cache.append([torch.randn(3)])
    with pytest.raises(RuntimeError, match='shape'):
        cache.get(0, lambda stored: [stored[0].view(2, 2)])
    with pytest.raises(IndexError):
        cache.get(1)


def test_bad_arguments(tmp_path):
    with pytest.raises(ConfigError, match='use device, host or disk'):
        make(tmp_path, 'gpu')
    with pytest.raises(ConfigError, match='use float32 or bfloat16'):
        make(tmp_path, dtype=torch.float16)
    with pytest.raises(ConfigError, match='folder'):
        ActivationCache('disk', 'cpu')
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match='--work-dir'):
        ActivationCache('disk', 'cpu', folder=tmp_path / 'file')


@cuda
@pytest.mark.parametrize('dtype', DTYPES)
def test_round_trip_on_cuda(tmp_path, store, dtype):
    cache = make(tmp_path, store, dtype, 'cuda')
    entries = [[torch.randn(1, 64, 9).expand(5, 64, 9), torch.randn(5, 64, 9, device='cuda'), torch.arange(4)]] * 2
    for entry in entries:
        cache.append(entry)
    assert cache.nbytes == entry_bytes(entries[0], dtype)

    def rows(stored):
        return [tensor[1:3] for tensor in stored]

    for select in (None, rows):
        wanted = [expected(tensor, dtype) for tensor in (entries[1] if select is None else rows(entries[1]))]
        for prefetch in (False, True, False):
            if prefetch:
                cache.prefetch(1, select)
                assert len(cache._ready) == (store != 'device')
            got = cache.get(1, select)
            assert all(tensor.device == cache.device for tensor in got)
            assert_same([tensor.cpu() for tensor in got], [tensor.cpu() for tensor in wanted])
    assert not cache._ready


@cuda
def test_prefetched_copies_do_not_mix(tmp_path):
    cache = make(tmp_path, 'host', torch.bfloat16, 'cuda')
    ramp = torch.linspace(-1, 1, 1 << 22)
    for value in range(4):
        cache.append([ramp + value])
    cache.prefetch(0)
    for step in range(50):
        cache.prefetch((step + 1) % 4)
        (tensor,) = cache.get(step % 4)
        # reading it late must still see this entry
        assert tensor.mean().item() == pytest.approx(step % 4, abs=1e-3)
    cache.clear()
    assert not cache._ready
