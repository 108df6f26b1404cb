-- Lmod: mpizero in a virtual environment that was made with the site's Python and mpi4py.
local version = "0.1.0"
local root = "/opt/mpizero/" .. version -- the environment: change it to where yours is

help([[
Distributed deep-learning training over MPI, in Python.
    mpirun -n 8 python train.py
    mpizero doctor
]])
whatis("Name: mpizero")
whatis("Version: " .. version)
whatis("Description: Distributed deep-learning training over MPI, in Python")

depends_on("openmpi") -- the MPI that mpi4py was built against

prepend_path("PATH", pathJoin(root, "bin"))
setenv("VIRTUAL_ENV", root)
