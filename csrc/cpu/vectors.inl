// Vectors of one register, kWordBytes, by compiler extension: the same source becomes SSE, AVX2, AVX-512 or NEON code.
// (What is wider than a register GCC compares and selects by way of memory.) Included inside a namespace and a target
// region, so it includes nothing itself.

typedef float f32v __attribute__((vector_size(kWordBytes)));
typedef double f64v __attribute__((vector_size(kWordBytes)));
typedef uint32_t u32v __attribute__((vector_size(kWordBytes)));
typedef int32_t i32v __attribute__((vector_size(kWordBytes)));
typedef uint16_t u16v __attribute__((vector_size(kWordBytes / 2)));

#define CONVBN_INLINE inline __attribute__((always_inline))

template <typename acc>
struct vector_of;
template <>
struct vector_of<float> {
  using type = f32v;
};
template <>
struct vector_of<double> {
  using type = f64v;
};
template <typename scalar_t>
using vec = typename vector_of<acc_t<scalar_t>>::type;
template <typename scalar_t>
constexpr int kLanes = kWordBytes / sizeof(acc_t<scalar_t>);

// ---- memory: k lanes, the rest are zero; k is the constant kLanes in all but the last step of a row ----

#if defined(CONVBN_AVX512)
// Masked instructions for the last step; GCC would widen and narrow in halves.
CONVBN_INLINE __mmask64 first_bytes(int bytes) { return ~__mmask64{0} >> (64 - bytes); }
template <class bits_t>
CONVBN_INLINE bits_t load_bits(const void* p, int bytes) {
  if constexpr (sizeof(bits_t) == 64)
    return (bits_t)(bytes == 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(first_bytes(bytes), p));
  else
    return (bits_t)(bytes == 32 ? _mm256_loadu_si256((const __m256i*)p)
                                : _mm256_maskz_loadu_epi8(first_bytes(bytes), p));
}
CONVBN_INLINE void store_bits(void* p, f32v v, int bytes) {
  bytes == 64 ? _mm512_storeu_si512(p, (__m512i)v) : _mm512_mask_storeu_epi8(p, first_bytes(bytes), (__m512i)v);
}
CONVBN_INLINE void store_bits(void* p, f64v v, int bytes) { store_bits(p, (f32v)v, bytes); }
CONVBN_INLINE void store_bits(void* p, u16v v, int bytes) {
  bytes == 32 ? _mm256_storeu_si256((__m256i*)p, (__m256i)v)
              : _mm256_mask_storeu_epi8(p, first_bytes(bytes), (__m256i)v);
}
CONVBN_INLINE u32v widen(u16v v) { return (u32v)_mm512_cvtepu16_epi32((__m256i)v); }
CONVBN_INLINE u16v narrow(u32v v) { return (u16v)_mm512_cvtepi32_epi16((__m512i)v); }
#else
// The binary digits of a number of bytes below 64 as copies of fixed size: no call of memcpy.
template <int piece>
CONVBN_INLINE void copy_pieces(char* to, const char* from, int bytes) {
  if (bytes & piece) {
    __builtin_memcpy(to, from, piece);
    to += piece;
    from += piece;
  }
  if constexpr (piece > 2) copy_pieces<piece / 2>(to, from, bytes);
}

template <class bits_t>
CONVBN_INLINE bits_t load_bits(const void* p, int bytes) {
  bits_t v{};
  if (bytes == sizeof v)
    __builtin_memcpy(&v, p, sizeof v);
  else
    copy_pieces<sizeof v / 2>(reinterpret_cast<char*>(&v), static_cast<const char*>(p), bytes);
  return v;
}
template <class bits_t>
CONVBN_INLINE void store_bits(void* p, bits_t v, int bytes) {
  if (bytes == sizeof v)
    __builtin_memcpy(p, &v, sizeof v);
  else
    copy_pieces<sizeof v / 2>(static_cast<char*>(p), reinterpret_cast<const char*>(&v), bytes);
}
CONVBN_INLINE u32v widen(u16v v) { return __builtin_convertvector(v, u32v); }
CONVBN_INLINE u16v narrow(u32v v) { return __builtin_convertvector(v, u16v); }
#endif

// The first k lanes; the rest are zero.
template <class V>
CONVBN_INLINE V first(V v, int k) {
  for (int i = k; i < int(sizeof v / sizeof v[0]); ++i) v[i] = 0;
  return v;
}

CONVBN_INLINE f32v load(const float* p, int k) { return load_bits<f32v>(p, 4 * k); }
CONVBN_INLINE f64v load(const double* p, int k) { return load_bits<f64v>(p, 8 * k); }
CONVBN_INLINE void store(float* p, f32v v, int k) { store_bits(p, v, 4 * k); }
CONVBN_INLINE void store(double* p, f64v v, int k) { store_bits(p, v, 8 * k); }

// bfloat16 is the upper half of a float; rounding to nearest even adds the lower half's carry.
CONVBN_INLINE f32v load(const bf16* p, int k) { return (f32v)(widen(load_bits<u16v>(p, 2 * k)) << 16); }
CONVBN_INLINE void store(bf16* p, f32v v, int k) {
  const u32v w = (u32v)v, rounded = w + 0x7fffu + ((w >> 16) & 1u);
  const u32v kept = v == v ? rounded : (w | 0x400000u);  // a NaN stays one
  store_bits(p, narrow(kept >> 16), 2 * k);
}

// float16: exponent 5 bits with bias 15, so a normal number's bits move by 13 and its exponent by 112.
CONVBN_INLINE f32v load(const f16* p, int k) {
  const u32v h = widen(load_bits<u16v>(p, 2 * k));
  const u32v magnitude = (h & 0x7fffu) << 13;
  const u32v finite = (u32v)((f32v)magnitude * 0x1p112f);  // subnormals come out right too
  const u32v bits = (h & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : finite;
  return (f32v)(bits | (h & 0x8000u) << 16);
}
CONVBN_INLINE void store(f16* p, f32v v, int k) {
  const u32v w = (u32v)v, sign = (w & 0x80000000u) >> 16, a = w & 0x7fffffffu;
  const u32v normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const u32v subnormal = (u32v)((f32v)a + 0.5f) - 0x3f000000u;  // 0.5's last bit weighs 2⁻²⁴, as float16's does
  const u32v special = a > 0x7f800000u ? (u32v{} + 0x7e00u) : (u32v{} + 0x7c00u);
  const u32v bits = a >= 0x47800000u ? special : a < 0x38800000u ? subnormal : normal;
  store_bits(p, narrow(bits | sign), 2 * k);
}

// ---- exp and erf: polynomials fitted at Chebyshev nodes, relative error about 1e-8 before rounding ----

CONVBN_INLINE f32v exp(f32v x) {
  // eˣ = 2ⁿ·eʳ, n = round(x / ln 2), |r| ≤ ln 2 / 2; ln 2 in two parts so that r is exact to rounding
  const f32v clamped = x > 88.8f ? f32v{} + 88.8f : x < -104.f ? f32v{} - 104.f : x;
  const f32v n = (clamped * 1.44269504f + 12582912.f) - 12582912.f;  // 1.5·2²³ rounds to an integer
  const f32v r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  f32v q = r * 0.00139339024f + 0.00836334843f;
  q = q * r + 0.0416664630f;
  q = q * r + 0.166665763f;
  q = q * r + 0.5f;
  const f32v e = (q * r + 1.f) * r + 1.f;
  // 2ⁿ in two factors: n reaches 128 and −150
  const i32v whole = __builtin_convertvector(n, i32v), half = whole >> 1;
  const f32v scale1 = (f32v)((half + 127) << 23), scale2 = (f32v)((whole - half + 127) << 23);
  return x == x ? e * scale1 * scale2 : x;
}

CONVBN_INLINE f32v erf(f32v x) {
  const f32v a = x < 0.f ? -x : x, s = x * x;
  f32v p = s * 7.88249745e-5f - 8.01885551e-4f;  // |x| < 1:  erf x = x·P(x²)
  p = p * s + 0.00518931216f;
  p = p * s - 0.0268543288f;
  p = p * s + 0.112835974f;
  p = p * s - 0.376126260f;
  p = p * s + 1.12837911f;
  const f32v t = a > 4.f ? f32v{} + 4.f : a;  // otherwise:  erf x = ±(1 − e^(−|x|·Q(|x|)))
  f32v q = t * -1.09303616e-6f + 3.53037685e-5f;
  q = q * t - 5.06273645e-4f;
  q = q * t + 0.00433651032f;
  q = q * t - 0.0252230633f;
  q = q * t + 0.107979037f;
  q = q * t + 0.634050846f;
  q = q * t + 1.12893426f;
  const f32v tail = 1.f - exp(-t * q);
  return a < 1.f ? x * p : x < 0.f ? -tail : x == x ? tail : x;
}

CONVBN_INLINE f64v exp(f64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
CONVBN_INLINE f64v erf(f64v x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_erf(x[i]);
  return x;
}
