# Cross-compile for aarch64 with Debian's g++-aarch64-linux-gnu and libc6-dev-arm64-cross; tests run under
# qemu-aarch64 (qemu-user): cmake --preset aarch64 && cmake --build --preset aarch64 && ctest --preset aarch64
#
# QEMU_CPU=cortex-a53 in ctest's environment chooses a CPU without dot products, cortex-a76 one with.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE BOTH)
