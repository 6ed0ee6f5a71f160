/* What a machine can do at most: bytes read from memory, and products of bytes in registers. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A buffer in huge pages, if the system gives them. */
uint8_t* make_buffer(size_t bytes) {
  uint8_t* data = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return NULL;
  madvise(data, bytes, MADV_HUGEPAGE);
  memset(data, 1, bytes);
  return data;
}

/* Reads `bytes`, a multiple of 256, as four streams. */
int64_t read_buffer(const uint8_t* data, size_t bytes) {
  const size_t part = bytes / 4;
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                     _mm256_setzero_si256()};
  for (size_t i = 0; i < part; i += 64) {
    for (int stream = 0; stream < 4; ++stream) {
      const __m256i* line = (const __m256i*)(data + stream * part + i);
      _mm_prefetch((const char*)line + 4096, _MM_HINT_T0);
      sums[stream] = _mm256_add_epi64(sums[stream], _mm256_load_si256(line));
      sums[stream] = _mm256_add_epi64(sums[stream], _mm256_load_si256(line + 1));
    }
  }
  __m256i sum =
      _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  return _mm256_extract_epi64(sum, 0) + _mm256_extract_epi64(sum, 3);
}

/* `times` times twelve dot products of bytes that do not wait for each other; returns how many
   operations that was, or 0 where the instruction is missing. */
int64_t multiply_bytes(int64_t times) {
#ifdef __AVX512VNNI__
  for (int64_t turn = 0; turn < times; ++turn) {
    __asm__ volatile(
        "vpdpbusd %%zmm0, %%zmm0, %%zmm0\n"
        "vpdpbusd %%zmm1, %%zmm1, %%zmm1\n"
        "vpdpbusd %%zmm2, %%zmm2, %%zmm2\n"
        "vpdpbusd %%zmm3, %%zmm3, %%zmm3\n"
        "vpdpbusd %%zmm4, %%zmm4, %%zmm4\n"
        "vpdpbusd %%zmm5, %%zmm5, %%zmm5\n"
        "vpdpbusd %%zmm6, %%zmm6, %%zmm6\n"
        "vpdpbusd %%zmm7, %%zmm7, %%zmm7\n"
        "vpdpbusd %%zmm8, %%zmm8, %%zmm8\n"
        "vpdpbusd %%zmm9, %%zmm9, %%zmm9\n"
        "vpdpbusd %%zmm10, %%zmm10, %%zmm10\n"
        "vpdpbusd %%zmm11, %%zmm11, %%zmm11\n"
        :
        :
        : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10",
          "zmm11");
  }
  return times * 12 * 64 * 2;
#else
  (void)times;
  return 0;
#endif
}
