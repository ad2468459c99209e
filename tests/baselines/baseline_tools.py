"""What tests of the other systems share."""

import pytest

from grass_lib.baselines import missing_baselines

needs_baselines = pytest.mark.skipif(bool(missing_baselines()), reason=missing_baselines() or "installed")
SIZES = {"layers": 2, "width": 32, "heads": 2, "vocabulary": 64, "positions": 16}
