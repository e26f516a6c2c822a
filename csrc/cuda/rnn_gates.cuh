// The arithmetic of a unit's gates in recurrent layers, forward and backward.
#pragma once
#include "activation.cuh"
#include "rnn.h"

namespace dlkern::cuda::rnn {

DLKERN_DEVICE float sigmoid(float x) { return activated(x, 3); }

// ---- Forward, from the sums before the activations ----

struct LstmCell {
  float in, forget, candidate, cell;
};
DLKERN_DEVICE LstmCell lstm_cell(float in, float forget, float candidate, float cell_before) {
  LstmCell x{sigmoid(in), sigmoid(forget), tanhf(candidate), 0.0f};
  x.cell = x.forget * cell_before + x.in * x.candidate;
  return x;
}

struct GruCell {
  float r, z, candidate, state;
};
// recurrent: what the recurrent product gives to the candidate.
DLKERN_DEVICE GruCell gru_cell(float r, float z, float candidate, float recurrent, float state_before) {
  GruCell x{sigmoid(r), sigmoid(z), 0.0f, 0.0f};
  x.candidate = tanhf(candidate + x.r * recurrent);
  x.state = x.candidate + x.z * (state_before - x.candidate);
  return x;
}

// The state, and the activation's derivative.
struct PlainCell {
  float state, slope;
};
DLKERN_DEVICE PlainCell plain_cell(float x, int mode) {
  const float h = activated(x, mode == kRnnTanh ? 2 : 1);
  return {h, mode == kRnnTanh ? 1.0f - h * h : x > 0.0f ? 1.0f : x != x ? x : 0.0f};
}

// ---- Gradients of those sums ----

struct LstmGradients {
  float in, forget, candidate;
};
DLKERN_DEVICE LstmGradients lstm_gradients(float of_cell, float in, float forget, float candidate, float cell_before) {
  return {of_cell * candidate * in * (1.0f - in), of_cell * cell_before * forget * (1.0f - forget),
          of_cell * in * (1.0f - candidate * candidate)};
}

struct GruGradients {
  float r, z, candidate, recurrent;
};
DLKERN_DEVICE GruGradients gru_gradients(float of_state, float recurrent, float r, float z, float candidate,
                                         float state_before) {
  const float dn = of_state * (1.0f - z) * (1.0f - candidate * candidate);
  return {dn * recurrent * r * (1.0f - r), of_state * (state_before - candidate) * z * (1.0f - z), dn, dn * r};
}

}  // namespace dlkern::cuda::rnn
