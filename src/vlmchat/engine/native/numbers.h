/* Vectors of bfloat16 and float32. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef uint16_t bf16;

INLINE float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE __m512 widen16(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
INLINE __m512 load_bf16(const bf16 *x) { return widen16(_mm256_loadu_si256((const void *)x)); }
INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
INLINE void store_bf16(bf16 *to, __m512 x) { _mm256_storeu_si256((void *)to, narrow(x)); }
INLINE __m512 rounded(__m512 x) { return widen16(narrow(x)); }
INLINE __m512 pair(const bf16 *x) {
    int32_t both;
    memcpy(&both, x, 4);
    return _mm512_castsi512_ps(_mm512_set1_epi32(both));
}
INLINE __m512 dot(__m512 sum, __m512 a, __m512 b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

/* e to the x, within 2 units of float32's last place (Cephes' polynomial). */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.3981999507e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(8.3334519073e-3f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(4.1665795894e-2f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(1.6666665459e-1f));
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(0.5f));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(x, x), _mm512_add_ps(x, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
}

/* SiLU of gate, times up. */
INLINE __m512 activated(__m512 gate, __m512 up) {
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
    return _mm512_mul_ps(rounded(_mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1), e))), up);
}

INLINE __mmask16 first_of(int64_t number) {
    return number >= 16 ? 0xffff : number <= 0 ? 0 : (__mmask16)((1u << number) - 1);
}

/* The sums of 16 vectors, each in its place. */
INLINE __m512 sums_of(const __m512 *x) {
    __m512 four[4];
    UNROLL for (int i = 0; i < 4; i++) {
        __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[4 * i], x[4 * i + 1]),
                                 _mm512_unpackhi_ps(x[4 * i], x[4 * i + 1]));
        __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[4 * i + 2], x[4 * i + 3]),
                                 _mm512_unpackhi_ps(x[4 * i + 2], x[4 * i + 3]));
        __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                                _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                             _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                             _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
