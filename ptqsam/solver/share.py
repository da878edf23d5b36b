"""Several processes: all go on with the quantized model of the main one."""

from typing import Any

import torch
from mmengine.dist import broadcast, broadcast_object_list, get_world_size, is_main_process
from torch import nn

from ptqsam.modules.walk import quant_ops, quantizers


@torch.no_grad()
def share_model(model: nn.Module) -> None:
    """Give all processes the quantized model of the main process: tensors, modes of quantizers, frozen weights.

    Args:
        model: with the same quant modules everywhere; changed in place where it is not that of the main process.
    """
    if get_world_size() == 1:
        return
    state = model.state_dict()
    modes = {quantizer.path: (quantizer.mode, quantizer.drop_prob) for quantizer in quantizers(model)}
    facts: list[Any] = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()},
        modes,
        {name for name, op, _ in quant_ops(model) if op.frozen},
    ]
    broadcast_object_list(facts)
    shapes, modes, frozen = facts
    device = next(model.parameters()).device
    if not is_main_process():
        state = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    for name in shapes:
        state[name] = state[name].contiguous()
        broadcast(state[name])
    if not is_main_process():
        model.load_state_dict(state)
    model.to(device)  # a quantizer that saw no data here has its parameters on the CPU
    for quantizer in quantizers(model):
        quantizer.mode, quantizer.drop_prob = modes[quantizer.path]
    for name, op, _ in quant_ops(model):
        op.frozen = name in frozen
        if op.frozen:
            op.original = None  # nothing is compared with it here
