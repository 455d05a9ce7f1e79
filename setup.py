"Fills in what pyproject.toml calls dynamic, from settings.ini, which nbdev reads as well."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser()
parser.read(root/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
suffix = "_requirements"

setup(
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Operating System :: POSIX :: Linux",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["digiq", "digiq.*"]),
    package_data={"digiq": ["models/**/*", "presets/*.yaml"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=cfg["requirements"].split(),
    extras_require={name.removesuffix(suffix): value.split() for name, value in cfg.items() if name.endswith(suffix)},
)
