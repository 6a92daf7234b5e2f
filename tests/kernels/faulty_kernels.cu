// A kernel that cannot keep its numbers in registers, for the ahead-of-time gate to find.
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* out, int n) {
    float kept[64], total = 0;
#pragma unroll
    for (int i = 0; i < 64; ++i) total += kept[i] = x[threadIdx.x + i * n];
#pragma unroll
    for (int i = 0; i < 64; ++i) out[threadIdx.x + i * n] = kept[i] / total;
}
