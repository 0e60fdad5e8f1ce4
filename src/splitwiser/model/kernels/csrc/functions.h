// Every function that Python calls, described where it is defined. build.py reads the types of the arguments from here.

#pragma once

#include <cstdint>

struct Linear;
struct Layer;
struct Step;
struct Head;

extern "C" {

int attention_supports_prefill(int64_t dtype, int64_t key_dim, int64_t value_dim);
int64_t compress(const void* packed, int64_t panels, int64_t pairs, void* to, int64_t limit);
int may_use_tiles();
int max_small_rows();
int supports_compressed();
int supports_int8();
void multiply_int8(const Linear* linear, const void* x, const void* residual, void* y, int64_t rows, int64_t threads);
void multiply_small_batch(const Linear* linear, const void* x, const void* residual, void* y, int64_t rows, int64_t threads);
void layers_small_batch(const Layer* layers, int64_t count, const Step* step, const void* x, void* y, const Head* head,
                        void* logits);
void project_rows(const Layer* layer, const void* x, const void* cosines, const void* sines, int64_t angles,
                  int64_t angles_in_float32, void* joint, int64_t rows, int64_t threads);
void complete_rows(const Layer* layer, const void* attended, const void* residual, void* y, int64_t rows, int64_t threads);
void widen(const void* compressed, int64_t panels, int64_t pairs, void* to, int64_t threads);
void rms_norm(const void* x, const void* weight, void* y, float offset, float epsilon, int64_t rows, int64_t width,
              int64_t threads);
void argmax(const void* x, int64_t* tokens, int64_t rows, int64_t width, int64_t threads);
void gate(const void* x, void* y, float linear, float cubic, int64_t rows, int64_t width, int64_t threads);
void rotate_heads(void* joint, const void* cosines, const void* sines, int64_t angles_in_float32, const void* query_weight,
                  const void* key_weight, float offset, float epsilon, int64_t rows, int64_t width, int64_t heads,
                  int64_t kv_heads, int64_t head_dim, int64_t rotary, int64_t angles, int64_t threads);
void attention(int64_t dtype, const void* query, const void* keys, const void* values, const int64_t* tables,
               const int64_t* starts, const int64_t* offsets, const int64_t* lengths, const float* sinks, const float* bias,
               int64_t bias_entries, int64_t bias_by_position, void* output, int64_t query_stride, int64_t requests,
               int64_t heads, int64_t kv_heads, int64_t key_dim, int64_t value_dim, int64_t block_tokens, int64_t table_width,
               float scaling, float softcap, int64_t in_tiles, int64_t threads);
void store(const char* keys, const char* values, const int64_t* slots, char* pool_keys, char* pool_values, int64_t tokens,
           int64_t key_stride, int64_t value_stride, int64_t key_bytes, int64_t value_bytes, int64_t threads);
void store_int8(int64_t dtype, const void* keys, const void* values, const int64_t* slots, int8_t* pool_keys,
                int8_t* pool_values, int64_t tokens, int64_t key_stride, int64_t value_stride, int64_t kv_heads,
                int64_t key_dim, int64_t value_dim, int64_t threads);

}  // extern "C"
