// How persistent clusters divide the work: a unit is one row of the draws for one tile of samples.
//
// Units are numbered row by row, tile after tile, and every cluster takes as many that follow each other, the first ones
// one more where it does not come out even. So none waits for a second wave, whatever the sizes. Every f is written once by
// one block: no result depends on the number of clusters.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

namespace fastscore {

// Where a cluster is in its share; clusters are counted along y, so that none divides for its number.
struct Unit {
  int row, tile, left;

  __device__ __forceinline__ explicit Unit(const Steps& p) {
    const uint32_t cluster = blockIdx.y, more = min(cluster, p.units_left);
    const uint32_t first = cluster * p.units_each + more;
    tile = static_cast<int>(first / static_cast<uint32_t>(p.rows));
    row = static_cast<int>(first - static_cast<uint32_t>(tile) * p.rows);
    left = static_cast<int>(p.units_each + (cluster < p.units_left));
  }

  // Go on to the next unit; whether it is of another tile.
  __device__ __forceinline__ bool advance(const Steps& p) {
    --left;
    if (++row < p.rows) return false;
    row = 0;
    ++tile;
    return true;
  }
};

}  // namespace fastscore
