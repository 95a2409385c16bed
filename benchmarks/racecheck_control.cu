// The control of sm90_sanitize.py for racecheck: two stages of shared memory, filled by bulk copies that complete a
// `full` mbarrier, read by 128 threads before the stage is filled again. At its `empty` mbarrier each of them arrives, or
// with an argument one lane of each warp behind a warp barrier, as the kernels do it. Nothing here is unordered, so what
// racecheck reports of it is not a race. Prints "right" if the sums are.
#include <cstdint>
#include <cstdio>

constexpr int STAGES = 2, THREADS = 128, BLOCKS = 64, BYTES = THREADS * sizeof(float);

__device__ uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

__device__ void wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}\n" ::"r"(
          shared_address(barrier)),
      "r"(phase)
      : "memory");
}

template <bool BY_WARPS>
__global__ void pipeline(const float* in, float* out, int blocks) {
  __shared__ alignas(128) float tiles[STAGES][THREADS];
  __shared__ alignas(8) uint64_t full[STAGES], empty[STAGES];
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&full[stage])));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&empty[stage])),
                   "r"(BY_WARPS ? THREADS / 32 : THREADS));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (threadIdx.x >= THREADS) {  // the producer
    if (threadIdx.x == THREADS) {
      for (int block = 0; block < blocks; ++block) {
        int stage = block % STAGES;
        wait(&empty[stage], block / STAGES % 2 ^ 1);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&full[stage])),
                     "r"(BYTES)
                     : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(tiles[stage])),
                     "l"(__cvta_generic_to_global(in + block * THREADS)), "r"(BYTES), "r"(shared_address(&full[stage]))
                     : "memory");
      }
    }
    return;
  }
  float sum = 0.0f;
  for (int block = 0; block < blocks; ++block) {
    int stage = block % STAGES;
    wait(&full[stage], block / STAGES % 2);
    sum += tiles[stage][threadIdx.x];
    if (BY_WARPS) __syncwarp();
    if (!BY_WARPS || threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&empty[stage])) : "memory");
    }
  }
  out[threadIdx.x] = sum;
}

int main(int count, char**) {
  static float in[BLOCKS * THREADS], out[THREADS];
  for (int i = 0; i < BLOCKS * THREADS; ++i) in[i] = static_cast<float>(i);
  float *device_in, *device_out;
  if (cudaMalloc(&device_in, sizeof(in)) != cudaSuccess || cudaMalloc(&device_out, sizeof(out)) != cudaSuccess) return 1;
  if (cudaMemcpy(device_in, in, sizeof(in), cudaMemcpyHostToDevice) != cudaSuccess) return 1;
  auto kernel = count > 1 ? pipeline<true> : pipeline<false>;
  kernel<<<1, THREADS + 32>>>(device_in, device_out, BLOCKS);
  if (cudaMemcpy(out, device_out, sizeof(out), cudaMemcpyDeviceToHost) != cudaSuccess) return 1;
  bool right = true;
  for (int thread = 0; thread < THREADS; ++thread) {
    right &= out[thread] == BLOCKS * (BLOCKS - 1) / 2 * THREADS + BLOCKS * thread;
  }
  puts(right ? "right" : "wrong");
  return !right;
}
