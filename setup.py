"""The description of a distribution: the README, its links to files of the repository as text.

Everything else is in pyproject.toml. Package indexes show the description without the repository,
so such links would not work there.
"""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")

setup(
    long_description=re.sub(r"\[([^\]]+)\]\((?!https://|#)[^)]+\)", r"\1", README),
    long_description_content_type="text/markdown",
)
