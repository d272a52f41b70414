// AdamW with the penalty folded in: every strip of weight, gradient and moments is read once, the new weight written, and
// y and z of the new weight taken from cache.
#pragma once
#include "step.h"

namespace spectral {

// Of one parameter group at this step.
struct AdamWHyper {
  double lr, beta1, beta2, eps, weight_decay, strength;
};

template <class C>
struct AdamWArguments {
  // Of all items, by item. All tensors of an item lie in memory as its weight does (Item::w's strides).
  void* const* weights;
  const void* const* gradients;  // an entry may be null: zero for a penalised parameter; a plain one is left as it is
  void* const* exp_avgs;
  void* const* exp_avg_sqs;
  void* const* max_exp_avg_sqs;  // null without amsgrad
  void* const* masters;          // null without; an entry may be null
  void* const* steps;            // C++ float, or double where the item's entry in step_is_double is set; incremented
  const uint8_t* step_is_double;
  const int32_t* group_of;
  const AdamWHyper* hyper;  // by group
  // Of the weights as they are; all become those of the new weights.
  C *v, *u, *sigma;
  int32_t* exponents;
  C* value;  // strength * R of the new weights
  double exponent, grad_scale;
  bool maximize, decoupled, stochastic;
  uint32_t seed;
  int threads;
};

// The items' `g` describes the gradients' type; their strides are the weights'.
template <class C>
void adamw_step(Table& table, const AdamWArguments<C>& arguments);

}  // namespace spectral
