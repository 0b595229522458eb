"""Packaging of sg4v_jax.

The bounds name what the test suite passes on: Python 3.11 resolves to JAX 0.10,
Python 3.12 and newer to JAX 0.12.
"""

import pathlib

import setuptools

ROOT = pathlib.Path(__file__).parent
ABOUT: dict[str, str] = {}
exec((ROOT / "sg4v_jax" / "version.py").read_text(), ABOUT)

CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorflow-datasets>=4.9.10,<5",
    "grain>=0.2.18,<0.3",
    "tensorstore>=0.1.70",
    "array_record>=0.8.1,<0.9",
    "sentencepiece>=0.2.1,<0.3",
    "ml_collections>=1.1.0,<2",
    "absl-py>=2.1",
    "numpy>=2.0,<3",
    "pillow>=11,<14",
    "pyarrow>=18",
    "etils[epath]>=1.9",
    # tensorflow-datasets needs it on every Python but declares it only for <3.9.
    "importlib_resources>=6",
    "jaxtyping>=0.3,<0.4",
    "tqdm>=4.66",
]

# Compiles for TPUs without one.
LIBTPU = [
    "libtpu==0.0.42.*; python_version < '3.12' and sys_platform == 'linux'",
    "libtpu==0.0.52.*; python_version >= '3.12' and sys_platform == 'linux'",
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "gpu": ["jax[cuda12]>=0.10.2,<0.13"],
    # `sg4v plan` on a machine without a TPU.
    "plan": LIBTPU,
    # To build a dataset on many machines.
    "beam": ["apache-beam>=2.60,<3"],
    # To tag the parts of speech of captions; its English model comes along.
    "report": ["HanTa>=1.2,<2"],
    # Event files for TensorBoard, without TensorFlow; and runs on wandb.ai.
    "tensorboard": ["tensorboardX>=2.6.5,<3"],
    "wandb": ["wandb>=0.19,<1"],
    # Writes MMBench's predictions as its server takes them.
    "eval": ["openpyxl>=3.1,<4"],
    # What the tests compare against; none of it is needed to run the library.
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.9",
        "mypy>=1.13",
        "beartype>=0.19",
        "hypothesis>=6",
        "mistral-common>=1.5",
        "HanTa>=1.2,<2",
        "tensorboardX>=2.6.5,<3",
        "openpyxl>=3.1,<4",
        # In any case there with JAX; the statistics are compared with its own.
        "scipy>=1.11",
        *LIBTPU,
        "torch==2.13.0",
        "transformers>=5,<6",
        "safetensors>=0.5,<1",
    ],
}

setuptools.setup(
    name="sg4v_jax",
    version=ABOUT["__version__"],
    description="ShareGPT4V on JAX: caption, train, chat, evaluate and convert, on TPU pods",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*setuptools.find_packages(include=["sg4v_jax", "sg4v_jax.*"]), "sg4v_jax.configs"],
    # configs/ stays at the top of the repository, and is installed with the package.
    package_dir={"sg4v_jax.configs": "configs"},
    package_data={"sg4v_jax.world": ["photos/*"], "sg4v_jax.caption.report": ["*.js"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["sg4v=sg4v_jax.__main__:main"]},
)
