"""Installation of minillm: `pip install -e .` (extras: workshop, tests, tensorboard, tiktoken).

The distribution is named minillm-stack, since another project owns `minillm` on the public index; what is imported is
minillm. A wheel carries launch/ and ds_configs/ inside the package, where minillm/utils/places.py finds them; an
editable installation reads those of the checkout.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

WORKSHOP = [  # what data_tools needs beyond training: readers, cleaning, topics, embeddings
    "datasets>=4,<6",
    "ftfy>=6.2",
    "gensim>=4.4,<5",
    "ijson>=3.3",
    "jieba>=0.42.1",
    "lxml_html_clean>=0.4",
    "protego>=0.4",
    "py3langid>=0.3",
    "pyarrow>=18",
    "pyldavis>=3.4.1",
    "requests>=2.32.2",
    "tomotopy>=0.14,<1",
    "trafilatura>=2,<3",
    "urllib3>=2.2",
    "xxhash>=3.4.1",
    "zstandard>=0.22",
]

CARRIED = {"minillm.launch": "launch", "minillm.ds_configs": "ds_configs"}  # in a wheel: in the checkout

here = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (here / "minillm" / "__init__.py").read_text()).group(1)

setup(
    name="minillm-stack",
    version=version,
    description="Train small language models with DeepSpeed, from raw text to a chat",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["minillm", "minillm.*", "data_tools", "data_tools.*"]), *CARRIED],
    package_dir=CARRIED,
    package_data={
        "data_tools": ["*.yaml", "*/*.yaml", "*/*.html"],
        "minillm.launch": ["*.txt", "supervise.sh", "configs/*.yaml", "slurm/*"],
        "minillm.ds_configs": ["*.json"],
    },
    entry_points={"console_scripts": ["minillm = minillm.__main__:main"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.11,<2.15",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "tokenizers>=0.23.1,<1",
        "safetensors>=0.8,<1",
        "webdataset>=1.0.2,<2",
        "wandb>=0.20,<1",
        "pydantic>=2.10,<3",
        "pyyaml>=6.0.1,<7",
        "numpy>=2,<3",
        "matplotlib>=3.8.4,<4",
        "tqdm>=4.66.3,<5",
        "jinja2>=3.1,<4",
        "ninja>=1.11.1",
        "setuptools>=70",
    ],
    extras_require={
        "workshop": WORKSHOP,
        "tests": [
            *WORKSHOP,
            *["build>=1.2", "pytest-xdist>=3.6,<4", "wheel>=0.43"],
            *["accelerate>=1.1,<2", "ipykernel>=6.25", "nbclient>=0.10", "nbformat>=5.10"],
            *["pytest>=8,<10", "ruff>=0.6,<1", "tiktoken>=0.8,<1"],
        ],
        "tiktoken": ["tiktoken>=0.8,<1"],
        "tensorboard": ["tensorboard>=2.17,<3"],
    },
)
