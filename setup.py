"""Puts configs, tools and model index into the wheel, where OpenMMLab's tools look for them."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Build the package with ``ser_mm/.mim``; an editable install uses the checkout itself."""

    def run(self):
        """Copy the modules, then what lies beside the package in the repository."""
        super().run()
        if self.editable_mode:
            return
        root, mim = Path(__file__).parent, Path(self.build_lib, 'ser_mm', '.mim')
        shutil.rmtree(mim, ignore_errors=True)
        # The set-up script makes the environment of a checkout.
        left_out = shutil.ignore_patterns('__pycache__', 'setup_env.sh')
        for folder in ('configs', 'tools'):
            shutil.copytree(root / folder, mim / folder, ignore=left_out)
        shutil.copy2(root / 'model-index.yml', mim)


setup(cmdclass={'build_py': BuildWithConfigs})
