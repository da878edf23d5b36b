"""What integer hardware would compute: the product of logarithmic and uniform codes by shifts and a small table."""

import torch
from torch import Tensor


def shift_table_product(codes: Tensor, values: Tensor, scale: Tensor, tau: int, bits: int) -> Tensor:
    """Product of an attention map of `AGQ` and uniform integers, without a multiplication per pair.

    With ``code = n tau + r`` a level is ``scale * table[r] * 2^-n``, ``table[r] = 2^(-r / tau)``. For each r, the
    integers are shifted by n and added up; the tau sums are multiplied by the table's entries once each. An accumulator
    has 62 bits, of which as many as the largest sum leaves over, F, lie behind the binary point (42 for 8 bits and 4096
    keys); what is shifted beyond is cut off. Where no shift exceeds F the sums are exact, and with tau 1 the whole
    product is; else it errs by less than ``scale * 2^(bits - F)``.

    Args:
        codes: (..., Q, K), integers in 0..2^bits - 1, the last one for 0 (`AGQ.encode`).
        values: (..., K, D), integers, ``code - zero_point`` of a uniform quantizer.
        scale: largest level of the map, 0-dim.
        tau: codes per octave, 1, 2 or 4.
        bits: bit width of the codes.

    Returns:
        (..., Q, D) float64; times the scale of the values it is the product of the fake-quantized tensors.
    """
    zero = 2**bits - 1
    largest = max(1, int(values.abs().max())) * codes.shape[-1]
    fraction = 62 - largest.bit_length()
    exact = values.double()  # whole numbers far below 2^53: their sums are exact
    total: Tensor | None = None
    for remainder in range(tau):
        accumulator = torch.zeros(1, dtype=torch.int64, device=values.device)
        for code in range(remainder, zero, tau):
            # integers that are shifted alike are added first, which changes nothing
            added = ((codes == code).double() @ exact).to(torch.int64)
            shift = fraction - code // tau
            accumulator = accumulator + (added << shift if shift >= 0 else added >> min(-shift, 63))
        part = accumulator.double() * 2.0 ** (-remainder / tau)
        total = part if total is None else total + part
    assert total is not None
    return total * (scale.double() * 2.0**-fraction)
