"""What pyproject.toml cannot say: a wheel also carries what a run needs, in ``pcpo_fast/shipped``.

An editable install finds it in the checkout (:mod:`pcpo_fast.config.shipped`).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "ds_configs", "examples", "assets/prompts", "assets/tiny-*")
LEFT_OUT = {"__pycache__", "runs"}  # what working in these folders leaves there


class BuildWithShipped(build_py):
    """Copies these folders into the package that is built."""

    def run(self) -> None:
        """Copy the modules, then the folders."""
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        for pattern in SHIPPED:
            for source in root.glob(f"{pattern}/**/*"):
                name = source.relative_to(root)
                if source.is_file() and LEFT_OUT.isdisjoint(name.parts):
                    target = Path(self.build_lib, "pcpo_fast", "shipped", name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithShipped})
