# Decides about CUDA, and compiles cuda/ as `based_cuda`. Included before all other targets, because a target takes
# CMAKE_CUDA_ARCHITECTURES when it is made.
#
#   BASED_CUDA=AUTO   for the GPUs of this machine; without one, or without nvcc, no CUDA code, and a line that says so
#   BASED_CUDA=ON     for every GPU that is supported, and PTX for later ones; needs nvcc, but no GPU
#   BASED_CUDA=OFF    no CUDA code
#
# CMAKE_CUDA_ARCHITECTURES (or the environment's CUDAARCHS) names the GPUs instead, and then AUTO needs none either.
set(BASED_MINIMUM_CUDA 12.8)

# A line that is seen. pip hides what a build prints, so there it also goes to the terminal, if there is one.
function(based_announce text)
  message(NOTICE "based: ${text}")
  if(SKBUILD)
    execute_process(COMMAND sh -c "printf '\\r\\033[Kbased: %s\\n' \"$1\" > /dev/tty" sh "${text}" ERROR_QUIET)
  endif()
endfunction()

if(NOT BASED_CUDA)
  return()
endif()

# The compiler, where CMake itself would look for it, and then where the toolkit puts it.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(BASED_NVCC nvcc PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
  if(BASED_NVCC)
    set(ENV{CUDACXX} "${BASED_NVCC}")
  endif()
endif()
if(CMAKE_CUDA_COMPILER)
  set(nvcc "${CMAKE_CUDA_COMPILER}")
else()
  set(nvcc "$ENV{CUDACXX}")
endif()

set(ask "BASED_CUDA=ON compiles it all the same")
if(BASED_CUDA STREQUAL "AUTO")
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # What the driver shows of GPUs: on a PC or server, on a Jetson, in WSL.
    file(GLOB gpus /dev/nvidia[0-9]* /proc/driver/nvidia/gpus/* /dev/nvgpu* /dev/nvhost-gpu /dev/dxg)
    if(NOT gpus)
      set(reason "there is no NVIDIA GPU here")
      if(nvcc)
        string(APPEND reason "; ${ask}")
      endif()
    endif()
    set(CMAKE_CUDA_ARCHITECTURES native)
  endif()
  if(NOT reason AND NOT nvcc)
    set(reason "there is an NVIDIA GPU here, but no nvcc: put that of CUDA ${BASED_MINIMUM_CUDA} or later on PATH")
  endif()
  if(NOT reason)
    execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version ERROR_QUIET)
    string(REGEX MATCH "release ([0-9.]+)" ignored "${version}")
    if(CMAKE_MATCH_1 VERSION_LESS BASED_MINIMUM_CUDA)
      set(reason "${nvcc} is of CUDA '${CMAKE_MATCH_1}', ${BASED_MINIMUM_CUDA} or later is needed")
    endif()
  endif()
  if(NOT reason)
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(reason "${nvcc} does not compile a test program; BASED_CUDA=ON shows why")
    endif()
  endif()
  if(reason)
    unset(CMAKE_CUDA_ARCHITECTURES)
    based_announce("no CUDA code: ${reason}")
    return()
  endif()
elseif(NOT nvcc)
  message(FATAL_ERROR "BASED_CUDA=${BASED_CUDA} needs nvcc of CUDA ${BASED_MINIMUM_CUDA} or later on PATH")
elseif(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100-real 120)
endif()

enable_language(CUDA)
find_package(CUDAToolkit ${BASED_MINIMUM_CUDA} REQUIRED)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION) # CMake 3.25.1 does not know that this nvcc has C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()

if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native")
  # CMake has asked the driver. Code for 9.0 alone leaves out the instructions of Hopper, which 9.0a has.
  set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
  list(FILTER CMAKE_CUDA_ARCHITECTURES INCLUDE REGEX "^([89]|[1-9][0-9])[0-9]-real$")
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90-" "90a-")
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(found ${CMAKE_CUDA_ARCHITECTURES_NATIVE}) # or "No CUDA devices found.", by CMake 4
    list(FILTER found INCLUDE REGEX "^[0-9]+-")
    set(reason "the driver here names no GPU of architecture 80 or later (found: '${found}')")
    if(NOT BASED_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "BASED_CUDA=${BASED_CUDA} for native GPUs: ${reason}")
    endif()
    based_announce("no CUDA code: ${reason}; ${ask}")
    return()
  endif()
endif()
list(JOIN CMAKE_CUDA_ARCHITECTURES " " architectures)
based_announce("CUDA ${CMAKE_CUDA_COMPILER_VERSION} code for ${architectures}")

# The runtime is linked statically: the library loads where there is no driver, and finds out.
file(GLOB BASED_CUDA_SOURCES CONFIGURE_DEPENDS cuda/*.cc cuda/kernels/*.cu)
add_library(based_cuda OBJECT ${BASED_CUDA_SOURCES})
set_target_properties(based_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_include_directories(based_cuda PRIVATE cuda cpp cpp/include)
target_link_libraries(based_cuda PRIVATE based_options CUDA::cudart_static)
set(BASED_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
