# SPDX-License-Identifier: Apache-2.0

from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyMpizero(PythonPackage):
    """Distributed deep-learning training over MPI, in Python."""

    # Until there is a release: `spack develop --path CLONE py-mpizero@0.1.0`.
    homepage = "https://example.org/mpizero"

    license("Apache-2.0")

    version("0.1.0")

    variant("torch", default=True, description="Train with PyTorch")
    variant("cuda", default=False, description="Reduce on GPUs, through CuPy")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@68:", type="build")
    depends_on("py-wheel", type="build")
    depends_on("mpi", type="run")
    depends_on("py-click@8:", type=("build", "run"))
    depends_on("py-ml-dtypes@0.4:", type=("build", "run"))
    depends_on("py-mpi4py@4:", type=("build", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-rich@13:", type=("build", "run"))
    depends_on("py-torch@2.4:", when="+torch", type=("build", "run"))
    depends_on("py-cupy@13:", when="+cuda", type=("build", "run"))

    import_modules = ["mpizero", "mpizero.cli"]
