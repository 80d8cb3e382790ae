// What activation.h is made of where an instruction looks up sixteen floats: tanh, Mills' ratio and
// the Gaussian by tables of short polynomials, in half the steps of long ones.
//
//   piecewise   a in [0, 15): of interval k its centre c, and coefficients of (a - c)^0 ... ^Degree
//
//       a   0    .25   .5   .75   1     1.5    2    2.5    3  4  5  6  7  9  11  13  15
//           |-----|-----|-----|---|------|-----|-----|-----|--|--|--|--|--|---|---|---|
//       k     12    13    14   15     0     1     2     3   4  5  6  7  8   9  10  11
//
//   k is the lower two bits of the exponent of 1 + a and the upper two of its mantissa: look_up takes
//   four bits and never sees the others. That sum is rounded, so a centre's polynomial goes a hair
//   further than its interval.
//
// Parameter   bounded by
// Degree      error, relative: tanh 1.3e-8 by 6 (by 5: 1.4e-7), Mills' ratio 1e-7 by 5 (by 4: 3e-6).
//             Above: a step is a lookup and a multiply-add, which share ports (Zen 5: half a cycle
//             each)
// 16          a register: a table of 32 takes two, and the units of the multiply-adds
//
// Numerics: minimax fits (Lawson's iteration on Chebyshev nodes). Centres are floats near the middle
// where the function itself is nearly a float, so that the constant term costs no rounding; of
// tanh on [0, .25) it is 0 and the next is 1. a - c is exact. NaN stays NaN.
#pragma once
#include "simd/vec.h"

namespace tilewright::ISA {
namespace {

template <int Degree>
struct Pieces {
  float centre[16], power[Degree + 1][16];
};

// clang-format off
constexpr Pieces<6> kPiecesOfTanh = {
    {1.25021327f, 1.75005722f, 2.2501092f, 2.75069952f, 3.50007868f, 4.50029421f, 5.50036287f, 6.5f,
     8.0f, 10.0028601f, 12.0028601f, 14.0f, 0.0f, 0.375047326f, 0.625029325f, 0.875141978f},
    {{0.848343432f, 0.941382051f, 0.97803086f, 0.991871059f, 0.998178184f, 0.999753356f,
      0.999966621f, 0.99999547f, 0.999999762f, 1.0f, 1.0f, 1.0f, 0.0f, 0.358398646f, 0.554620028f,
      0.703977227f},
     {0.280313313f, 0.113799788f, 0.0434556343f, 0.0161918048f, 0.00364038115f, 0.000493237341f,
      6.67575732e-05f, 9.04133321e-06f, 4.50205988e-07f, 7.88779353e-09f, 1.44470991e-10f,
      2.76859872e-12f, 1.0f, 0.871550441f, 0.692396641f, 0.504416049f},
     {-0.237802044f, -0.107129045f, -0.0425009429f, -0.0160601828f, -0.00363372522f,
      -0.000493112835f, -6.67551722e-05f, -8.37511834e-06f, -2.12527382e-07f, -8.15858812e-08f,
      -1.4942968e-09f, -2.75471573e-11f, -1.09006692e-06f, -0.312362492f, -0.38401708f,
      -0.355097443f},
     {0.108315274f, 0.0629227161f, 0.0270823687f, 0.0105320103f, 0.00241138763f, 0.000328238006f,
      4.44524885e-05f, 6.02336013e-06f, 2.97961378e-07f, 7.1495001e-09f, 1.30942562e-10f,
      1.81575317e-12f, -0.33327049f, -0.178569153f, -0.0178214554f, 0.0818395242f},
     {-0.0126067493f, -0.0235242061f, -0.0123210028f, -0.0050932602f, -0.00119714404f,
      -0.000163978693f, -2.22247127e-05f, -1.01096093e-05f, -7.7974795e-07f, 1.92690166e-07f,
      3.52923957e-09f, 6.51148996e-11f, -0.00117997872f, 0.168115228f, 0.13789396f, 0.0607561581f},
     {-0.0196702201f, 0.00348451245f, 0.00397665333f, 0.00191241375f, 0.000490190112f,
      6.82412792e-05f, 9.27236579e-06f, 1.24897258e-06f, 6.75633842e-08f, -5.50030466e-10f,
      -1.00694522e-11f, 4.3030816e-13f, 0.143065929f, 0.0189810786f, -0.0543487854f,
      -0.0585401803f},
     {0.0151035395f, 0.00210539345f, -0.000716075883f, -0.000545786752f, -0.000157677903f,
      -2.26060656e-05f, -3.0858705e-06f, 1.85029203e-05f, 3.9665062e-07f, -1.30573298e-07f,
      -2.39152986e-09f, -4.41454026e-11f, -0.0369462594f, -0.0690958202f, -0.0243336298f,
      0.0128684761f}},
};
constexpr Pieces<5> kPiecesOfMillsRatio = {
    {1.2502135f, 1.75014138f, 2.25044966f, 2.75006509f, 3.50012922f, 4.50064564f, 5.50073862f,
     6.50021839f, 8.00124359f, 10.0014229f, 12.0013008f, 14.0004892f, 0.125002161f, 0.375064343f,
     0.625056863f, 0.875097752f},
    {{0.230736732f, 0.185221091f, 0.153628007f, 0.130722165f, 0.106341697f, 0.0847922042f,
      0.0703337863f, 0.0600137413f, 0.0491151288f, 0.0395011753f, 0.0330154337f, 0.028351672f,
      0.453792483f, 0.379587919f, 0.323344976f, 0.279755503f},
     {-0.110472098f, -0.0747791827f, -0.053210184f, -0.0394478142f, -0.02673259f, -0.0173226055f,
      -0.0120544899f, -0.00883983355f, -0.00596013665f, -0.00387426838f, -0.0027140514f,
      -0.00200489559f, -0.342217237f, -0.256572396f, -0.196833283f, -0.154128864f},
     {0.0463104881f, 0.027173087f, 0.0169404242f, 0.0111189838f, 0.0063867094f, 0.00341454451f,
      0.00201256247f, 0.00127643696f, 0.000713259564f, 0.000376481883f, 0.000221646478f,
      0.000141083205f, 0.205506489f, 0.141677946f, 0.100156248f, 0.072438702f},
     {-0.0175242238f, -0.00907388702f, -0.00502872141f, -0.00295655453f, -0.00145894079f,
      -0.000651478942f, -0.000327902642f, -0.000180876057f, -8.42340814e-05f, -3.6258316e-05f,
      -1.79851522e-05f, -9.88026659e-06f, -0.105509646f, -0.0678113401f, -0.0447432771f,
      -0.03024593f},
     {0.00615343964f, 0.00284325285f, 0.00141415698f, 0.000750730105f, 0.000324977766f,
      0.000121961391f, 5.26502445e-05f, 2.53385588e-05f, 1.00032403e-05f, 3.50486357e-06f,
      1.46318314e-06f, 6.93269783e-07f, 0.0482451469f, 0.0291512478f, 0.0180975087f, 0.0115215527f},
     {-0.00199160865f, -0.000830993406f, -0.000374888943f, -0.000181130046f, -6.85865671e-05f,
      -2.19472895e-05f, -8.20415607e-06f, -3.46622642e-06f, -1.15176942e-06f, -3.31868108e-07f,
      -1.17294832e-07f, -4.80975189e-08f, -0.0199334249f, -0.0114027839f, -0.00670398958f,
      -0.00404475769f}},
};

// 2^(i/16)
constexpr float kRoots[16] = {
    1.0f, 1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f, 1.29683959f, 1.35425556f,
    1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f, 1.68179286f, 1.7562522f, 1.83400810f, 1.91520655f};
// clang-format on

template <int Degree>
TW_INLINE Vec piecewise(const Pieces<Degree>& pieces, Vec a) {
  const VecI k = as_int(a + 1.0f) >> 21;
  const Vec x = a - look_up(pieces.centre, k);
  Vec y = look_up(pieces.power[Degree], k);
  for (int d = Degree; d-- > 0;) y = fma(y, x, look_up(pieces.power[d], k));
  return y;
}

TW_INLINE Vec tanh(Vec x) {
  return copy_sign(piecewise(kPiecesOfTanh, at_most(abs(x), 14.9f)), x);
}

// Phi(-a) e^(a^2 / 2), less what times_gaussian is too large by: 1.4e-9 a^2 of it.
TW_INLINE Vec mills_ratio(Vec a) {
  return piecewise(kPiecesOfMillsRatio, a);
}

// y e^(-a^2 / 2) = y 2^n e^(-r / 2), n in sixteenths and |r| <= ln2 / 16: a^2 in two parts, as an error
// of the exponent is one of the result. 2^n is a root from the table times a power. What 2 ln2 as one
// float is wrong by grows as n does, that is with a^2: mills_ratio makes up for it.
TW_INLINE Vec times_gaussian(Vec y, Vec a) {
  constexpr float kMinusHalfLog2E = -0.721347511f, kTwiceLn2 = 1.38629436f;
  const Vec square = a * a, rest = fma(a, a, -square);
  const Vec magic = broadcast(786432.0f);  // 1.5 * 2^19: the sum has no bits below a sixteenth
  const Vec rounded = fma(square, broadcast(kMinusHalfLog2E), magic), n = rounded - magic;
  const Vec r = fma(n, broadcast(kTwiceLn2), square) + rest;
  const Vec p =
      fma(fma(r, broadcast(-2.083405e-2f), broadcast(1.25004210e-1f)), r, broadcast(-0.5f));
  const Vec root = y * look_up(kRoots, as_int(rounded));
  return times_floor_power(fma(root * r, p, root), n);
}

}  // namespace
}  // namespace tilewright::ISA
