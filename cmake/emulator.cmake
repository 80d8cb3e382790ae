# The CUDA emulator (csrc/emulator) and how kernels are compiled for it: tests only, never in a wheel.
#
#   tilewright_emulator            the library, shared by both
#   tilewright_emulated_fast       compile and link kernels with this to run them fast, or
#   tilewright_emulated_checked    with this to check every load and store
#   add_emulated_kernels(NAME fast|checked SOURCES)    a library of kernels, .cu or .cc
#   _emulated_fast, _emulated_checked    the extension with those kernels: what _core is, and a GPU

if(SKBUILD)
  message(FATAL_ERROR "TILEWRIGHT_EMULATOR is for tests: no wheel has the emulator.")
endif()
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR "TILEWRIGHT_EMULATOR needs g++, whose -fsanitize=thread calls the emulator stands in for; "
                      "this is ${CMAKE_CXX_COMPILER_ID}.")
endif()

# Headers alone: no nvcc, no driver, no GPU.
if(NOT TILEWRIGHT_CUDA_INCLUDE)
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
  if(Python_FOUND)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(*nvidia.__path__, sep=';', end='')"
                    OUTPUT_VARIABLE nvidia_packages ERROR_QUIET)
    list(TRANSFORM nvidia_packages APPEND /cu13/include)
  endif()
  foreach(folder IN LISTS nvidia_packages ITEMS $ENV{CUDA_HOME}/include $ENV{CUDA_PATH}/include /usr/local/cuda/include
                                                /usr/include)
    if(EXISTS ${folder}/cuda_bf16.h AND EXISTS ${folder}/crt/host_defines.h
       AND (EXISTS ${folder}/nv/target OR EXISTS ${folder}/cccl/nv/target))
      set(TILEWRIGHT_CUDA_INCLUDE ${folder} CACHE PATH "Folder of cuda_bf16.h, crt/ and nv/ (or cccl/nv/)")
      break()
    endif()
  endforeach()
endif()
if(NOT TILEWRIGHT_CUDA_INCLUDE)
  message(FATAL_ERROR "CUDA's headers are missing: run `python -m pip install 'nvidia-cuda-runtime>=13,<14' "
                      "'nvidia-cuda-crt>=13,<14' 'nvidia-cuda-cccl>=13,<14'`, set CUDA_HOME to an installed toolkit, "
                      "or give the folder as -DTILEWRIGHT_CUDA_INCLUDE=...")
endif()
message(STATUS "CUDA headers for the emulator: ${TILEWRIGHT_CUDA_INCLUDE}")

# The build machine's instructions: nothing of this leaves it. No contraction, so that results don't depend on them; a
# kernel that wants a fused multiply-add says so. -g1: findings name lines.
add_library(tilewright_emulated_flags INTERFACE)
target_link_libraries(tilewright_emulated_flags INTERFACE tilewright_flags)
target_include_directories(tilewright_emulated_flags SYSTEM INTERFACE ${TILEWRIGHT_CUDA_INCLUDE}
                                                                  ${TILEWRIGHT_CUDA_INCLUDE}/cccl)
target_compile_options(
  tilewright_emulated_flags INTERFACE -march=native -ffp-contract=off -fno-strict-aliasing -g1 -Wno-psabi
                                      -Wno-unknown-pragmas)

file(GLOB TILEWRIGHT_EMULATOR_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/emulator/*.cc)
add_library(tilewright_emulator STATIC ${TILEWRIGHT_EMULATOR_SOURCES})
target_link_libraries(tilewright_emulator PRIVATE tilewright_emulated_flags PUBLIC ${CMAKE_DL_LIBS})
target_compile_options(tilewright_emulator PRIVATE -O3)

foreach(mode IN ITEMS fast checked)
  add_library(tilewright_emulated_${mode} INTERFACE)
  target_link_libraries(tilewright_emulated_${mode} INTERFACE tilewright_emulated_flags tilewright_emulator)
  target_compile_definitions(tilewright_emulated_${mode} INTERFACE TILEWRIGHT_EMULATE=1)
endforeach()
target_compile_options(tilewright_emulated_fast INTERFACE -O3)
# Compiled with, never linked with, the sanitizer: csrc/emulator/hooks.cc has the functions that it calls.
target_compile_options(tilewright_emulated_checked INTERFACE -O1 -fsanitize=thread --param
                                                             tsan-instrument-func-entry-exit=0)

function(add_emulated_kernels name mode)
  add_library(${name} STATIC ${ARGN})
  target_link_libraries(${name} PUBLIC tilewright_emulated_${mode})
  foreach(source IN LISTS ARGN)
    if(source MATCHES "\\.cu$")
      set_source_files_properties(${source} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
    endif()
  endforeach()
endfunction()

# The project's kernels, in both modes.
file(GLOB TILEWRIGHT_CUDA_SOURCES CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu)
if(TILEWRIGHT_CUDA_SOURCES)
  add_emulated_kernels(tilewright_kernels_fast fast ${TILEWRIGHT_CUDA_SOURCES})
  add_emulated_kernels(tilewright_kernels_checked checked ${TILEWRIGHT_CUDA_SOURCES})
endif()

# The extension module as it is with CUDA, but emulated: tests load it in the place of _core. What the front doors and
# the binding are compiled with differs from _core's by definitions alone, so that ccache has what they don't reach;
# everything below is libtilewright's.
if(TILEWRIGHT_PYTHON)
  file(GLOB gpu_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/ops/*.cc ${PROJECT_SOURCE_DIR}/csrc/python/gpu/*.cc)
  add_library(tilewright_emulated_extension OBJECT ${TILEWRIGHT_BINDING_SOURCES} ${gpu_sources})
  target_link_libraries(tilewright_emulated_extension PRIVATE tilewright_extension)
  target_include_directories(tilewright_emulated_extension SYSTEM PRIVATE ${TILEWRIGHT_CUDA_INCLUDE}
                                                                          ${TILEWRIGHT_CUDA_INCLUDE}/cccl)
  target_compile_definitions(tilewright_emulated_extension PRIVATE TILEWRIGHT_HAS_GPU="emulated" TILEWRIGHT_EMULATE=1)
  foreach(mode IN ITEMS fast checked)
    pybind11_add_module(_emulated_${mode} MODULE NO_EXTRAS $<TARGET_OBJECTS:tilewright_emulated_extension>)
    target_link_libraries(_emulated_${mode} PRIVATE tilewright $<LINK_ONLY:tilewright_kernels_${mode}>)
  endforeach()
endif()
