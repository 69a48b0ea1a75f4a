"""The first operation at which two forwards of a row part."""

import pytest
import torch
from torch import Tensor, nn

from pcpo_fast.profiling.operations import ForwardComparison, compare, recorded


class Scale(nn.Module):
    """Element by element, so that no library chooses another way of adding up for another batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """A layer, and arithmetic of its own that differs a little where gradients are recorded."""

    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.scale, self.differs = Scale(), differs

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale(x)
        y = y.relu() + x
        return y * (1 + 2**-20) if self.differs and torch.is_grad_enabled() else y * 1.0


class Network(nn.Module):
    def __init__(self, *differs: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(one) for one in differs)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(12.0).reshape(12, 1).sin()  # without rows, but of a length that may look like some
        for block in self.blocks:
            x = block(x) + table[:5, 0, None]
        return x


def forwards(network: Network, first: Tensor, second: Tensor, halves: int = 1) -> ForwardComparison:
    with recorded(network, len(first) // halves, halves) as one, torch.no_grad():
        network(first)
    with recorded(network, len(second) // halves, halves) as other:
        network(second)
    assert not network._forward_hooks and not network._forward_pre_hooks
    return compare(one, other)


@pytest.mark.parametrize("halves", [1, 2])
def test_the_first_difference_is_found_where_it_is_made(halves: int) -> None:
    rows = torch.randn(7 * halves, 5, 6)
    again = torch.randn(3 * halves, 5, 6)
    again[::3], again[1] = rows[::7], torch.nan  # the first row of each half is watched, the others are not
    network = Network(False, True, True)
    found = forwards(network, rows, again, halves)
    assert found.first is not None and found.before is not None
    one, other = found.first
    assert (one.module, one.name, one.size) == ("blocks.1", "aten::mul", 30 * halves)
    assert one.distance(other) == pytest.approx(2**-20, rel=0.2)
    assert (found.before.module, found.before.name) == ("blocks.1", "aten::add")
    assert found.distances["blocks.0"] == 0 == found.distances["blocks.1.scale"]
    assert 0 < found.distances["blocks.1"] < found.distances["blocks.2"] and found.distances[""] > 0


def test_equal_bits_are_no_difference() -> None:
    rows = torch.randn(4, 5, 6)
    found = forwards(Network(False, False), rows, rows[:1])
    assert found.first is None and found.before is None and set(found.distances.values()) == {0.0}
    assert found.compared > 2 * 5


def test_modules_alone_for_compiled_code() -> None:
    network, rows = Network(False, True), torch.randn(2, 5, 6)
    with recorded(network, 2, operations=False) as one, torch.no_grad():
        network(rows)
    with recorded(network, 2, operations=False) as other:
        network(rows)
    found = compare(one, other)
    assert found.compared == 5 and found.unmatched == 0
    assert found.first is not None and (found.first[0].module, found.first[0].name) == ("blocks.1", "Block")


def test_a_forward_that_fails_leaves_no_hooks() -> None:
    network = Network(False)
    with pytest.raises(RuntimeError), recorded(network, 1):
        network(torch.randn(1, 5, 7))
    assert not network.blocks[0]._forward_hooks
