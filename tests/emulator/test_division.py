"""How a launch divides samples and rows over a GPU: by the clusters that run at once, not by multiprocessors."""

import ctypes
import itertools
from typing import NamedTuple

import pytest
from emulator import build as builder
from emulator.comparison import load

pytestmark = pytest.mark.slow
# Clusters of 1, 2 and 4 blocks that an H200 runs at once: it has 132 multiprocessors; the last two were measured.
H200 = (132, 66, 30)
NO_CLUSTERS, NO_FOURS = (132, 0, 0), (132, 66, 0)


class Division(NamedTuple):
    cluster: int
    tiles: int
    splits: int
    rows: int  # a block's

    def waves(self, active):
        clusters = self.tiles // self.cluster * self.splits
        return -(-clusters // active[self.cluster // 2])


@pytest.fixture(scope="module")
def divide():
    library = load(builder.CSRC, "sm90_density_mlp")

    def ask(hidden, batch, rows, active=H200, linears=8, cluster=0, splits=0):
        found = (ctypes.c_int32 * 4)()
        stride = 7 * hidden + 8 * 64
        sizes = hidden, 128 if hidden == 512 else 64, linears, stride, batch, rows, cluster, splits
        library.division_of(*sizes, (ctypes.c_int32 * 3)(*active), found)
        return Division(*found)

    return ask


def test_width_512_runs_in_one_wave(divide):
    """4,096 samples in clusters of four would be 32 of them where 30 run at once."""
    found = divide(512, 4096, 256)
    assert found == Division(cluster=2, tiles=64, splits=2, rows=128)
    assert found.waves(H200) == 1
    assert divide(512, 4096, 256, cluster=4, splits=2).waves(H200) == 2


@pytest.mark.parametrize(
    ("hidden", "longest"),
    [(64, 43), (128, 64), (256, 64)],  # 22 tiles x 6 = 132, 32 tiles x 4 = 128
)
def test_the_benchmark_takes_one_wave(divide, hidden, longest):
    found = divide(hidden, 4096, 256)
    assert found.waves(H200) == 1
    assert found.rows == longest


@pytest.mark.parametrize("active", [H200, (78, 36, 16), NO_FOURS, NO_CLUSTERS, (1, 0, 0)])
def test_every_row_and_sample_has_its_block(divide, active):
    for hidden, batch, rows in itertools.product((64, 256, 512), (1, 63, 64, 65, 193, 1000, 4096), (1, 2, 7, 256)):
        found = divide(hidden, batch, rows, active)
        samples = 64 if hidden == 512 else 192 if hidden == 64 else 128
        assert found.tiles % found.cluster == 0
        assert 0 <= found.tiles - -(-batch // samples) < found.cluster
        assert found.rows * (found.splits - 1) < rows <= found.rows * found.splits
        assert active[found.cluster // 2] > 0


def test_no_other_division_is_shorter(divide):
    """Against all divisions of the smallest cluster that shares weights."""
    for batch, rows in itertools.product((64, 500, 4096, 20000), (1, 16, 100, 256)):
        found, tiles = divide(512, batch, rows), -(-batch // 64)
        length = found.waves(H200) * (found.rows + 1)
        for splits in range(1, rows + 1):
            each = -(-rows // splits)
            clusters = -(-tiles // 2) * -(-rows // each)
            assert length <= -(-clusters // 66) * (each + 1), (batch, rows, found, splits)


def test_weights_are_shared_where_there_are_two_tiles(divide):
    assert divide(512, 64, 256).cluster == 1
    assert divide(512, 65, 256).cluster == 2
    assert divide(512, 65, 256, NO_CLUSTERS).cluster == 1


def test_what_is_asked_for_is_taken(divide):
    assert divide(512, 4096, 256, cluster=4, splits=3) == Division(4, 64, 3, 86)
    assert divide(512, 4096, 5, cluster=1, splits=300) == Division(1, 64, 5, 1)
    assert divide(64, 4096, 256, cluster=4).cluster == 1, "weights that stay are not shared"
