# Compiles every source of cpp/backend/cpu/kernels once per instruction set, in a namespace of that name; which one
# runs is chosen at run time (cpp/backend/cpu/cpu_features.cc).
file(GLOB BASED_KERNEL_SOURCES CONFIGURE_DEPENDS cpp/backend/cpu/kernels/*.cc)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(BASED_ISAS baseline avx2 avx512 avx512bf16)
  set(BASED_KERNEL_HEADERS <immintrin.h>) # a second per source, most of what a small kernel takes
  set(BASED_FLAGS_baseline "")
  set(BASED_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(BASED_FLAGS_avx512 ${BASED_FLAGS_avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  set(BASED_FLAGS_avx512bf16 ${BASED_FLAGS_avx512} -mavx512bf16)
else()
  set(BASED_ISAS baseline) # on AArch64 the baseline has NEON
  set(BASED_KERNEL_HEADERS <arm_neon.h>)
  set(BASED_FLAGS_baseline "")
endif()

# Whatever the build type: kernels are made of small inline pieces. Sanitizers choose their own.
set(BASED_KERNEL_OPTIMISATION -O3)
if(BASED_SANITIZE)
  set(BASED_KERNEL_OPTIMISATION "")
endif()

foreach(isa IN LISTS BASED_ISAS)
  add_library(based_kernels_${isa} OBJECT ${BASED_KERNEL_SOURCES})
  target_include_directories(based_kernels_${isa} PRIVATE cpp cpp/include)
  target_compile_definitions(based_kernels_${isa} PRIVATE BASED_ISA=isa_${isa})
  # No exceptions and no errno: kernels call nothing that needs them. Contraction is off, as everywhere: simd.h's fmadd
  # is what fuses.
  target_compile_options(based_kernels_${isa} PRIVATE ${BASED_KERNEL_OPTIMISATION} -fno-math-errno -fno-exceptions
                         ${BASED_FLAGS_${isa}})
  target_precompile_headers(based_kernels_${isa} PRIVATE ${BASED_KERNEL_HEADERS})
  target_link_libraries(based_kernels_${isa} PRIVATE based_options)
  target_sources(based PRIVATE $<TARGET_OBJECTS:based_kernels_${isa}>)
  string(TOUPPER ${isa} ISA)
  target_compile_definitions(based PRIVATE BASED_HAS_ISA_${ISA})
endforeach()
