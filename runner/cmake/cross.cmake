# Cross compilation with Debian's compilers: -DAMX_ARCH=aarch64 (or riscv64, ...).
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES AMX_ARCH)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR ${AMX_ARCH})
set(CMAKE_CXX_COMPILER ${AMX_ARCH}-linux-gnu-g++)
set(CMAKE_LIBRARY_ARCHITECTURE ${AMX_ARCH}-linux-gnu)
