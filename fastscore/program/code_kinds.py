"""Which names and kinds of things a reader of code does not follow, and why: fixed, harmless, or never the same."""

from __future__ import annotations

import ctypes
import datetime
import gc
import glob
import inspect
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import types
import uuid

import numpy as np
import torch

# Code of these is not read: it is fixed, or has no state that steers a network.
FIXED = frozenset({"torch", "numpy", "scipy", "einops", "triton", "functorch", "_pytest"} | sys.stdlib_module_names)
# Through these, code reads attributes that it does not name.
DYNAMIC = frozenset({"getattr", "vars", "__dict__", "attrgetter", "eval", "exec", "globals", "locals"})
# What gives another answer at every call.
OUTSIDE = (open, input, time.time, time.perf_counter, time.monotonic, time.process_time)
OUTSIDE += (sys._getframe, sys.getrefcount, inspect.currentframe, gc.get_count, gc.get_objects, gc.get_referrers)
OUTSIDE += (datetime.datetime, datetime.date, torch.get_rng_state, os.urandom, uuid.uuid4)
# Whose methods give another answer at every call.
RANDOM = (random.Random, np.random.RandomState, np.random.Generator, torch.Generator)
# Through these, code reads names that stand in texts, or files.
HIDDEN = (eval, exec, globals)
HIDDEN_ATTRIBUTES = frozenset({"__globals__", "f_globals", "f_locals"})
FILES = frozenset({"load", "loadtxt", "genfromtxt", "fromfile", "memmap", "read_text", "read_bytes"})
# What asks for files by their names, and methods of paths that do; the latter are names that others have, too.
_OF_OS = ("stat", "lstat", "listdir", "scandir", "walk", "fwalk", "access", "readlink", "open", "popen", "system")
_OF_OS_PATH = ("exists", "lexists", "isfile", "isdir", "islink", "ismount", "getsize", "getmtime", "getatime")
_OF_OS_PATH += ("getctime", "samefile", "realpath")
FILE_CALLS = tuple(getattr(os, name) for name in _OF_OS if hasattr(os, name))
FILE_CALLS += tuple(getattr(os.path, name) for name in _OF_OS_PATH)
FILE_CALLS += (glob.glob, glob.iglob, shutil.which, shutil.disk_usage, subprocess.run, subprocess.Popen)
OF_PATHS = frozenset({"exists", "is_file", "is_dir", "is_symlink", "is_mount", "stat", "lstat", "iterdir", "glob"})
OF_PATHS |= frozenset({"rglob", "walk", "open", "samefile", "readlink", "resolve", "owner", "group"})
ENVIRONMENT = frozenset({"getenv", "getenvb", "environb", "expandvars", "expanduser", "home"})
# Methods that a call of the network does not reach.
LIFECYCLE = frozenset({"__init__", "__new__", "__del__", "__repr__", "__str__", "__reduce__", "__reduce_ex__"})
LIFECYCLE |= frozenset({"__init_subclass__", "__class_getitem__", "__set_name__", "__getstate__", "__setstate__"})
# Whose instances are called, or looked at, and hold nothing that changes.
FIXED_CALLS = (types.MethodWrapperType, types.WrapperDescriptorType, types.MethodDescriptorType, np.ufunc)
FIXED_CALLS += (types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType)
FIXED_CALLS += (types.UnionType, torch.qscheme, torch.finfo, torch.iinfo)
FIXED_CALLS += (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
HARMLESS = (logging.LoggerAdapter, type(NotImplemented), type(threading.RLock()))
LOCKS = (type(threading.Lock()),)
# Memory that others write to.
FOREIGN_MEMORY = (memoryview, ctypes.c_byte.__mro__[-2])  # the latter is the base of all that ctypes has
