"""Before anything is imported."""

import os

# Tests ask no hub: what is fetched from one is tested on what they make themselves.
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
