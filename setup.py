"""Package description; pyproject.toml holds the build tool and the tools' settings."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent

# Lower bounds name the release that brought what the code uses, or one for Python 3.11 and NumPy 2; upper bounds the
# release that is known, or by its number allowed, to break us. Verified together are the pins in requirements.txt.
#
# mmcv (>=2.1,<2.2, as mmdet 3.3 demands) is missing on purpose. PyPI has it only as source, its build script imports
# the torch that is already installed, and a resolver would build it in isolation, where there is none: `pip install`
# would end in a traceback of mmcv's. mmdet leaves it out for the same reason. `make setup` installs it; by hand it is
# `pip install --no-build-isolation 'mmcv>=2.1,<2.2'` after torch, with setuptools<81.
REQUIRES = [
    'torch>=2.6,<3',  # 2.6: weights_only is the default, and safe_globals the way to widen it
    'torchvision>=0.21',  # pairs with torch 2.6
    'numpy>=2.0,<3',
    'mmengine>=0.10.7,<1',
    'mmdet>=3.3,<3.4',
    'segment-anything>=1.0,<2',
    'timm>=1.0,<2',
    'safetensors>=0.4.3',
    'matplotlib>=3.9',
    'opencv-python>=4.10',
    'pillow>=10.1',
    'pycocotools>=2.0.8',
    'pydantic>=2.7,<3',
    'pyyaml>=6.0.1',
    'jinja2>=3.1',
    'scikit-image>=0.24',
    'scikit-learn>=1.5',
    'scipy>=1.13',
    'threadpoolctl>=3.2',
    'tqdm>=4.66',
]
# wandb-workspaces: the definition of a dashboard comes from a method that is not public
WANDB = ['wandb>=0.28.2', 'wandb-workspaces>=0.4.13,<0.5']
RAY = ['ray>=2.40,<3']
DEV = ['hypothesis>=6.100', 'mypy>=1.10', 'pytest>=8.2', 'pytest-xdist>=3.5', 'ruff>=0.9', 'types-PyYAML', *WANDB, *RAY]


def read_version() -> str:
    """The version, without importing the package: its needs may not be installed yet."""
    text = (ROOT / 'ptqsam' / '__init__.py').read_text(encoding='utf-8')
    match = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    assert match is not None, 'ptqsam/__init__.py has no __version__'
    return match.group(1)


readme = ROOT / 'README.md'
setup(
    name='ptqsam',
    version=read_version(),
    description='Post-training quantization of the Segment Anything family',
    long_description=readme.read_text(encoding='utf-8') if readme.is_file() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11',
    packages=find_namespace_packages(include=['ptqsam', 'ptqsam.*', 'projects', 'projects.*']),
    package_data={'ptqsam.report.page': ['page.*', '*.html']},
    install_requires=REQUIRES,
    extras_require={'wandb': WANDB, 'ray': RAY, 'dev': DEV},
    entry_points={'console_scripts': ['ptqsam-test = ptqsam.cli:main', 'ptqsam-sweep = ptqsam.sweep.cli:main']},
    classifiers=[
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
