// One step of the model in WebAssembly with SIMD: int8 weights, one sequence, no library.
//
// The arithmetic is that of mhesa/inference/decoder: products of int8 weights with rows of 8 bits, summed exactly in
// 32 bits, the rest in fp32. Rows are held as int16, for which WebAssembly has products of pairs. mhesa/export/web.py
// writes the weights in the order in which a step reads them. `make wasm` builds step.wasm.

#include <stdint.h>
#include <wasm_simd128.h>

#define EXPORT(name) __attribute__((export_name(name)))
#define LARGEST(a, b) ((a) > (b) ? (a) : (b))
#define SMALLEST_NORMAL 0x1p-126f

typedef struct {
    int32_t num_tokens, dim, depth, heads, inner, hidden, taps, adaptive;
} Sizes;

static int padded(int size) { return (size + 15) & -16; }

// Memory

extern uint8_t __heap_base;
static uint8_t *used_up_to = &__heap_base;

// Memory for so many bytes, never freed; null if the browser has none.
EXPORT("reserve") void *reserve(uint32_t bytes) {
    uint8_t *start = (uint8_t *)(((uintptr_t)used_up_to + 15) & -16);
    uint32_t pages = ((uintptr_t)start + bytes + 0xffff) >> 16, present = __builtin_wasm_memory_size(0);
    if (pages > present && __builtin_wasm_memory_grow(0, pages - present) == (uintptr_t)-1) return 0;
    used_up_to = start + bytes;
    return start;
}

static const Sizes *sizes;
static float *x, *u, *v, *rate_logits, *product;
static int16_t *operand;

// Make ready for the weights of a file; false if memory is short.
EXPORT("load") int load(const Sizes *file) {
    sizes = file;
    int widest = LARGEST(LARGEST(file->dim, file->inner), file->hidden);
    x = reserve(4 * file->dim);
    u = reserve(4 * LARGEST(file->hidden, file->dim));
    v = reserve(4 * file->inner);
    rate_logits = reserve(4 * file->heads);
    product = reserve(4 * widest);
    operand = reserve(2 * padded(widest));
    return operand != 0;
}

EXPORT("state_size") int state_size(void) {
    return sizes->inner + (sizes->taps > 1 ? (sizes->taps - 1) * sizes->dim : 0);
}

static const uint8_t *next;

// The next part of the file.
static const void *take(int bytes) {
    const uint8_t *part = next;
    next += padded(bytes);
    return part;
}

static const float *take_floats(int count) { return take(4 * count); }

// Functions of one number

static float exponential(float value) {
    float power = value * 1.44269504f;
    power = power < -126 ? -126 : power > 126 ? 126 : power;
    float whole = __builtin_rintf(power), part = (power - whole) * 0.693147181f;
    float series = 1 + part * (1 + part * (0.5f + part * (1 / 6.f + part * (1 / 24.f + part * (1 / 120.f + part / 720)))));
    union { int32_t bits; float value; } scale = {.bits = ((int32_t)whole + 127) << 23};
    return series * scale.value;
}

// The constants are explained in mhesa/ops/cpu/gelu_kernels.py.
static float gelu(float value) {
    float inside = value < -5.5f ? -5.5f : value > 5.5f ? 5.5f : value, s = inside * inside;
    float top = -1.4552496169e-10f;
    top = top * s + 1.0356924445e-07f;
    top = top * s + 1.6759729472e-05f;
    top = top * s + 3.3838693030e-04f;
    top = top * s + 9.5901819715e-03f;
    top = top * s + 6.5295765551e-02f;
    top = top * s + 7.9788457008e-01f;
    float bottom = 1.9728211082e-06f;
    bottom = bottom * s + 8.1419014239e-05f;
    bottom = bottom * s + 1.9273644506e-03f;
    bottom = bottom * s + 2.8436436733e-02f;
    bottom = bottom * s + 2.4850286644e-01f;
    bottom = bottom * s + 1;
    return value < -5.5f ? 0 : value * (0.5f * inside * (top / bottom) + 0.5f);
}

// Rows

static void normalise(const float *from, float *to, int n) {
    const float *weight = take_floats(n), *bias = take_floats(n);
    float total = 0, spread = 0;
    for (int i = 0; i < n; i++) total += from[i];
    float mean = total / n;
    for (int i = 0; i < n; i++) spread += (from[i] - mean) * (from[i] - mean);
    float scale = 1 / __builtin_sqrtf(spread / n + 1e-5f);
    for (int i = 0; i < n; i++) to[i] = (from[i] - mean) * scale * weight[i] + bias[i];
}

// Convolve a row in place; `tail` holds the rows before it, oldest first.
static void convolve(float *row, float *tail, int taps, int n) {
    const float *weight = take_floats(taps * n);
    for (int i = 0; i < n; i++) {
        float value = row[i], total = weight[i] * value;
        for (int tap = 1; tap < taps; tap++) total += weight[tap * n + i] * tail[(taps - 1 - tap) * n + i];
        for (int past = 0; past < taps - 2; past++) tail[past * n + i] = tail[(past + 1) * n + i];
        if (taps > 1) tail[(taps - 2) * n + i] = value;
        row[i] = total;
    }
}

static void smooth(float *row, float *state) {
    int n = sizes->inner, channels = n / sizes->heads;
    const float *alphas = take_floats(sizes->heads), *decays = take_floats(sizes->heads), *skip = take_floats(n);
    for (int head = 0; head < sizes->heads; head++) {
        float alpha = alphas[head], decay = decays[head];
        if (sizes->adaptive) {
            alpha = 1 / (1 + exponential(-(alpha + rate_logits[head])));
            decay *= 1 - alpha;
        }
        for (int i = head * channels; i < (head + 1) * channels; i++) {
            float h = decay * state[i] + alpha * row[i];
            h = __builtin_fabsf(h) < SMALLEST_NORMAL ? 0 : h;
            state[i] = h;
            row[i] = h + skip[i] * row[i];
        }
    }
}

// Write a row to `operand`; returns its scale, NaN if a value is not finite.
static float pack(const float *row, int n) {
    const int largest = 127;
    float peak = 0, zero = 0;
    for (int i = 0; i < n; i++) {
        float size = __builtin_fabsf(row[i]);
        peak = size > peak ? size : peak;
        zero += row[i] * 0;
    }
    float scale = peak > largest * SMALLEST_NORMAL ? largest / peak : 0;
    for (int i = 0; i < n; i++) operand[i] = (int16_t)(int32_t)__builtin_rintf(row[i] * scale);
    for (int i = n; i < padded(n); i++) operand[i] = 0;
    return peak / largest + zero;
}

// The products of the packed row with the next matrix.
static void multiply(float scale, int columns, float *out, int outputs) {
    columns = padded(columns);
    const float *scales = take_floats(outputs);
    const int8_t *matrix = take(outputs * columns);
    // Four outputs at a time use each loaded value four times; past the end, the last row stands in.
    for (int first = 0; first < outputs; first += 4) {
        const int8_t *rows[4];
        v128_t totals[4];
        for (int i = 0; i < 4; i++) {
            rows[i] = matrix + (first + i < outputs ? first + i : outputs - 1) * columns;
            totals[i] = wasm_i32x4_splat(0);
        }
        for (int column = 0; column < columns; column += 16) {
            v128_t low = wasm_v128_load(operand + column), high = wasm_v128_load(operand + column + 8);
            for (int i = 0; i < 4; i++) {
                v128_t weights = wasm_v128_load(rows[i] + column);
                v128_t a = wasm_i32x4_dot_i16x8(wasm_i16x8_extend_low_i8x16(weights), low);
                v128_t b = wasm_i32x4_dot_i16x8(wasm_i16x8_extend_high_i8x16(weights), high);
                totals[i] = wasm_i32x4_add(totals[i], wasm_i32x4_add(a, b));
            }
        }
        for (int i = 0; i < 4 && first + i < outputs; i++) {
            int32_t total = wasm_i32x4_extract_lane(totals[i], 0) + wasm_i32x4_extract_lane(totals[i], 1) +
                            wasm_i32x4_extract_lane(totals[i], 2) + wasm_i32x4_extract_lane(totals[i], 3);
            out[first + i] = total * (scale * scales[first + i]);
        }
    }
}

// The model

static void block(float *state) {
    int dim = sizes->dim, inner = sizes->inner, hidden = sizes->hidden;
    normalise(x, u, dim);
    if (sizes->taps) convolve(u, state + inner, sizes->taps, dim);
    float scale = pack(u, dim);
    multiply(scale, dim, u, hidden);
    multiply(scale, dim, v, inner);
    if (sizes->adaptive) multiply(scale, dim, rate_logits, sizes->heads);
    for (int i = 0; i < hidden; i++) u[i] = gelu(u[i]);
    for (int i = 0; i < inner; i++) v[i] = gelu(v[i]);
    normalise(v, v, inner);
    smooth(v, state);
    multiply(pack(v, inner), inner, product, hidden);
    for (int i = 0; i < hidden; i++) u[i] *= product[i];
    multiply(pack(u, hidden), hidden, product, dim);
    const float *bias = take_floats(dim);
    for (int i = 0; i < dim; i++) x[i] += product[i] + bias[i];
}

// Read a token, which must be below num_tokens, into `state`, (depth, state_size), and write the next one's logits.
EXPORT("step") void step(int token, float *state, float *logits) {
    next = (const uint8_t *)(sizes + 1);
    const float *embedding = take_floats(sizes->num_tokens * sizes->dim);
    for (int i = 0; i < sizes->dim; i++) x[i] = embedding[token * sizes->dim + i];
    for (int layer = 0; layer < sizes->depth; layer++) block(state + layer * state_size());
    multiply(pack(x, sizes->dim), sizes->dim, logits, sizes->num_tokens);
}
