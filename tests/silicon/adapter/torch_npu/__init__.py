"""A package of this name for tests: the device of `fake_npu.py`, and plain PyTorch in place of the vendor's ops.

It comes before a real one by PYTHONPATH, in processes that tests start. With DAEDAL_TEST_FAULT it does not
load, as where the vendor's own libraries are missing.
"""

import os

from daedal.ops import silicon
from tests.silicon import fake_npu, vendor_ops, vendor_schemas

if "DAEDAL_TEST_FAULT" in os.environ:
    raise ImportError("libascendcl.so: cannot open shared object file: No such file or directory")
DEVICE = fake_npu.install(silicon.read("ascend-910c"))
LIBRARY = vendor_schemas.define()
DEVICE.vendor = dict(vendor_ops.OPS)
