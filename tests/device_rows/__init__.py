"""The rows of `test_every_call_on_a_device.py`: every public call, as a function of where things are put."""

from . import adapters, density, parts, runs, spaces
from .common import COVERED, ROWS, SCHEDULES
from .spaces import ODE

__all__ = ["COVERED", "ODE", "ROWS", "SCHEDULES", "adapters", "density", "parts", "runs", "spaces"]
