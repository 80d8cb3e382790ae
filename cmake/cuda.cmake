# The CUDA kernels, compiled by nvcc: no GPU, no driver. What it must never do fails the build: spill registers, or
# keep arrays in local memory.
#
#   tilewright_cuda_kernels    for each csrc/cuda/*.cu, below build/…/cuda: NAME.o, and what nvcc made on its way there,
#                              NAME/*.ptx and NAME/*.cubin

set(TILEWRIGHT_CUDA_ARCHITECTURE sm_80 CACHE STRING "What nvcc compiles the kernels for")
set(TILEWRIGHT_NVCC_FLAGS "" CACHE STRING "More flags for nvcc, separated by semicolons")

if(NOT TILEWRIGHT_NVCC)
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
  if(Python_FOUND)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(*nvidia.__path__, sep=';', end='')"
                    OUTPUT_VARIABLE nvidia_packages ERROR_QUIET)
    list(TRANSFORM nvidia_packages APPEND /cu13/bin)
  endif()
  find_program(TILEWRIGHT_NVCC nvcc HINTS ${nvidia_packages} ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
               PATH_SUFFIXES bin)
endif()
if(NOT TILEWRIGHT_NVCC)
  set(hint "nvcc is missing: run `python -m pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' "
           "'nvidia-cuda-runtime==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*'`, set CUDA_HOME to an "
           "installed toolkit, or give it as -DTILEWRIGHT_NVCC=...")
  string(CONCAT hint ${hint})
  if(TILEWRIGHT_CUDA STREQUAL "AUTO")
    message(STATUS "No CUDA: ${hint}")
    return()
  endif()
  message(FATAL_ERROR "${hint}")
endif()
message(STATUS "CUDA kernels: ${TILEWRIGHT_NVCC} for ${TILEWRIGHT_CUDA_ARCHITECTURE}")

# -fmad=false: a multiply-add is fused where fmaf is written, as in the emulator and on the CPU.
set(nvcc_flags
    -std=c++20 -arch=${TILEWRIGHT_CUDA_ARCHITECTURE} -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden
    -I${PROJECT_SOURCE_DIR}/csrc -I${PROJECT_SOURCE_DIR}/csrc/include
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage
    ${TILEWRIGHT_NVCC_FLAGS})
# Known to spill, a few hundred bytes with heads of 128 and 256 and up to 20 in some float32 kernels: their tiles want another
# shape there. nvcc says how much; the build goes on.
set(known_to_spill attention_forward attention_backward)
file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
set(cuda_objects)
foreach(source IN LISTS cuda_sources)
  get_filename_component(name ${source} NAME_WE)
  set(kept ${PROJECT_BINARY_DIR}/cuda/${name})
  set(strict -Werror=all-warnings)
  if(name IN_LIST known_to_spill)
    set(strict "")
  endif()
  file(MAKE_DIRECTORY ${kept})
  add_custom_command(
    OUTPUT ${kept}.o
    COMMAND ${CMAKE_COMMAND} -E time ${TILEWRIGHT_NVCC} ${nvcc_flags} ${strict} --keep --keep-dir ${kept} -MD -MF ${kept}.d -c
            ${source} -o ${kept}.o
    DEPENDS ${source}
    DEPFILE ${kept}.d
    COMMENT "nvcc ${name}.cu"
    VERBATIM)
  list(APPEND cuda_objects ${kept}.o)
endforeach()
add_custom_target(tilewright_cuda_kernels DEPENDS ${cuda_objects})
