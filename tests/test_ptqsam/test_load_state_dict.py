"""State dicts into modules: the prefix of a parallel model, strict loading, and what is said of misfits."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from ptqsam.errors import AssetError
from ptqsam.weights import load_state_dict, load_state_dict_strict, load_weights, tell


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))


@pytest.fixture
def state() -> OrderedDict:
    torch.manual_seed(0)
    return _net().state_dict()


def _same(left: dict, right: dict) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in right)


def test_prefix_of_a_parallel_model(state, tmp_path, told) -> None:
    parallel = nn.DataParallel(_net())
    parallel.module.load_state_dict(state)
    torch.save({'state_dict': parallel.state_dict()}, tmp_path / 'a.pth')
    loaded = load_weights(tmp_path / 'a.pth')
    assert _same(loaded, state) and loaded._metadata == state._metadata
    assert told == [
        f"{tmp_path / 'a.pth'}: names begin with 'module.', as a parallel model saves them; read without it"
    ]


def test_prefix_of_averaged_weights(state, tmp_path, told) -> None:
    net = _net()
    net.load_state_dict(state)
    torch.save(torch.optim.swa_utils.AveragedModel(net, use_buffers=True).state_dict(), tmp_path / 'a.pth')
    assert _same(load_weights(tmp_path / 'a.pth'), state), 'without n_averaged'
    assert len(told) == 1


@pytest.mark.parametrize('name', ['other.weight', 'modules.weight', 'steps_taken'])
def test_prefix_stays_where_not_all_names_have_it(state, tmp_path, told, name) -> None:
    content = {f'module.{key}': value for key, value in state.items()} | {name: torch.ones(1)}
    torch.save(content, tmp_path / 'a.pth')
    assert _same(load_weights(tmp_path / 'a.pth'), content) and told == []


def test_only_the_main_process_tells(told, monkeypatch) -> None:
    monkeypatch.setattr('ptqsam.weights.is_main_process', lambda: False)
    tell('something')
    monkeypatch.setattr('ptqsam.weights.is_main_process', lambda: True)
    tell('something else')
    assert told == ['something else']


def test_strict_load_copies_everything(state) -> None:
    net = _net()
    load_state_dict_strict(net, state, 'a.pth')
    assert _same(net.state_dict(), state)


def _misfit(state: dict, **options) -> str:
    with pytest.raises(AssetError) as error:
        load_state_dict_strict(_net(), state, 'a.pth', **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def test_strict_load_lists_at_most_three_of_each(state) -> None:
    other = {'0.weight': state['0.weight']} | {f'x.{i}': torch.ones(1) for i in range(4)}
    assert _misfit(other) == (
        'a.pth: does not fit Sequential: 5 missing (0.bias, 1.weight, 1.bias, ...); 4 unexpected (x.0, x.1, x.2, ...)'
    )


def test_strict_load_names_wrong_shapes_beside_the_rest(state) -> None:
    del state['0.bias']
    state |= {'0.weight': torch.ones(4, 9), 'y': torch.ones(1)}
    assert _misfit(state) == (
        'a.pth: does not fit Sequential: 1 missing (0.bias); 1 unexpected (y); '
        '1 of another shape (0.weight is (4, 9), needs (4, 8))'
    )


def test_strict_load_ignores_what_it_may(state) -> None:
    del state['1.running_mean']
    state['0.cached_index'] = torch.ones(1)
    assert 'running_mean' in _misfit(dict(state), ignore=[r'cached_index$'])
    assert 'cached_index' in _misfit(dict(state), ignore=[r'running_mean$'])
    load_state_dict_strict(_net(), state, 'a.pth', ignore=[r'cached_index$', r'running_mean$'])


def test_strict_load_asks_the_hint_only_on_failure(state) -> None:
    seen = []

    def hint(content: dict) -> str:
        seen.append(len(content))
        return 'the file is a large one'

    load_state_dict_strict(_net(), state, 'a.pth', hint=hint)
    assert seen == []
    assert _misfit({}, hint=hint).endswith('...); the file is a large one') and seen == [0]
    assert _misfit({}, hint=lambda content: None).endswith('...)')


def test_load_leaves_the_judgement_to_the_caller(state) -> None:
    net = _net()
    assert not any(load_state_dict(net, state, 'a.pth'))
    assert _same(net.state_dict(), state)
    state |= {'0.weight': torch.ones(4, 9), 'y': torch.ones(1), 'z': torch.ones(1)}
    del state['0.bias']
    misfits = load_state_dict(net, state, 'a.pth', ignore=['^z$'])
    assert misfits == (['0.bias'], ['y'], ['0.weight is (4, 9), needs (4, 8)'])
    assert str(misfits) == (
        '1 missing (0.bias); 1 unexpected (y); 1 of another shape (0.weight is (4, 9), needs (4, 8))'
    )


def test_strict_load_leaves_renaming_to_the_module(state) -> None:
    class Renaming(nn.Linear):
        def _load_from_state_dict(self, content, prefix, *args) -> None:
            content[f'{prefix}weight'] = content.pop(f'{prefix}old_weight')
            super()._load_from_state_dict(content, prefix, *args)

    net = Renaming(8, 4)
    load_state_dict_strict(net, {'old_weight': state['0.weight'], 'bias': state['0.bias']}, 'a.pth')
    assert torch.equal(net.weight, state['0.weight'])
