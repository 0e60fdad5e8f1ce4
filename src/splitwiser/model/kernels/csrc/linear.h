// A linear layer as Python passes it.

#pragma once

#include <cstdint>

extern "C" {

// packed_linear.py's LinearStruct; bias may be null. With scales and offsets the weights are int8, in int8.cpp's layout; without
// (null) they are bfloat16, in layer.cpp's. panel: outputs per panel, a multiple of 16; padded_inputs: inputs with their padding,
// whole pairs of bfloat16 or whole quads of int8.
struct Linear {
    const void *packed, *bias;
    const float* scales;
    const int32_t* offsets;
    int64_t inputs, outputs, relu, panel, padded_inputs;
};

}  // extern "C"
