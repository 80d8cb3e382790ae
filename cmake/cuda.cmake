# The CUDA kernels, compiled by nvcc: no GPU, no driver. What it must never do fails the build: spill registers, or
# keep arrays in local memory.
#
#   tilewright_cuda_kernels    for each csrc/cuda/*.cu, below build/…/cuda: NAME.o, and what nvcc made on its way there,
#                              NAME/*.ptx and NAME/*.cubin
#   _cuda                      the extension module with them: _core's sources, TILEWRIGHT_HAS_GPU defined; it takes
#                              _core's place in the package (python/tilewright/_extension.py)

# Code for 8.0 runs on all 8.x; what is newer than the last compiles its PTX when it is first used.
set(TILEWRIGHT_CUDA_ARCHITECTURES "80;90" CACHE STRING "Compute capabilities that nvcc compiles the kernels for")
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
# What is missing ends the build where CUDA is asked for, and is only said where it is AUTO.
macro(no_cuda)
  string(CONCAT hint ${ARGN})
  if(TILEWRIGHT_CUDA STREQUAL "AUTO")
    message(STATUS "No CUDA: ${hint}")
    return()
  endif()
  message(FATAL_ERROR "${hint}")
endmacro()
if(NOT TILEWRIGHT_NVCC)
  no_cuda("nvcc is missing: run `python -m pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' "
          "'nvidia-cuda-runtime==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*'`, set CUDA_HOME to an "
          "installed toolkit, or give it as -DTILEWRIGHT_NVCC=...")
endif()
execute_process(COMMAND ${TILEWRIGHT_NVCC} --version OUTPUT_VARIABLE nvcc_version)
string(REGEX MATCH "release ([0-9]+)" _ "${nvcc_version}")
if(NOT CMAKE_MATCH_1 OR CMAKE_MATCH_1 LESS 12)
  no_cuda("${TILEWRIGHT_NVCC} is of CUDA ${CMAKE_MATCH_1}; the kernels are C++20 and need 12 or newer")
endif()
message(STATUS "CUDA kernels: ${TILEWRIGHT_NVCC} for ${TILEWRIGHT_CUDA_ARCHITECTURES}")

set(architectures)
foreach(capability IN LISTS TILEWRIGHT_CUDA_ARCHITECTURES)
  list(APPEND architectures -gencode=arch=compute_${capability},code=sm_${capability})
endforeach()
list(GET TILEWRIGHT_CUDA_ARCHITECTURES -1 newest)
list(APPEND architectures -gencode=arch=compute_${newest},code=compute_${newest})

# -fmad=false: a multiply-add is fused where fmaf is written, as in the emulator and on the CPU.
set(nvcc_flags
    -std=c++20 ${architectures} -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden
    -I${PROJECT_SOURCE_DIR}/csrc -I${PROJECT_SOURCE_DIR}/csrc/include
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage -Werror=all-warnings
    ${TILEWRIGHT_NVCC_FLAGS})
# The largest sources take nvcc 2 GB of memory each.
cmake_host_system_information(RESULT memory QUERY TOTAL_PHYSICAL_MEMORY)
math(EXPR jobs "${memory} / 2048")
if(jobs EQUAL 0)
  set(jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS nvcc=${jobs})
file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
set(cuda_objects)
foreach(source IN LISTS cuda_sources)
  get_filename_component(name ${source} NAME_WE)
  set(kept ${PROJECT_BINARY_DIR}/cuda/${name})
  file(MAKE_DIRECTORY ${kept})
  add_custom_command(
    OUTPUT ${kept}.o
    COMMAND ${CMAKE_COMMAND} -E time ${TILEWRIGHT_NVCC} ${nvcc_flags} --keep --keep-dir ${kept} -MD -MF ${kept}.d -c
            ${source} -o ${kept}.o
    DEPENDS ${source}
    DEPFILE ${kept}.d
    COMMENT "nvcc ${name}.cu"
    JOB_POOL nvcc
    VERBATIM)
  list(APPEND cuda_objects ${kept}.o)
endforeach()
add_custom_target(tilewright_cuda_kernels DEPENDS ${cuda_objects})

if(TILEWRIGHT_PYTHON)
  execute_process(COMMAND ${TILEWRIGHT_NVCC} --dryrun -x cu /dev/null ERROR_VARIABLE dryrun)  # nvcc may be a script
  string(REGEX MATCH "TOP=([^\n]+)" _ "${dryrun}")
  set(toolkit ${CMAKE_MATCH_1})
  find_library(TILEWRIGHT_CUDART cudart_static HINTS ${toolkit} PATH_SUFFIXES lib lib64 REQUIRED)
  file(GLOB gpu_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/ops/*.cc ${PROJECT_SOURCE_DIR}/csrc/python/gpu/arrays.cc)
  set_source_files_properties(${cuda_objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  pybind11_add_module(_cuda MODULE ${TILEWRIGHT_BINDING_SOURCES} ${gpu_sources} ${cuda_objects})
  target_compile_definitions(_cuda PRIVATE TILEWRIGHT_HAS_GPU="cuda")
  # The runtime is linked statically and opens the driver when it is first needed: importing needs neither.
  target_link_libraries(_cuda PRIVATE tilewright_extension ${TILEWRIGHT_CUDART} ${CMAKE_DL_LIBS} rt)
  target_link_options(_cuda PRIVATE -static-libstdc++ -static-libgcc)
  if(SKBUILD)
    install(TARGETS _cuda LIBRARY DESTINATION tilewright)
  endif()
endif()
