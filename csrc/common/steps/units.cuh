// How persistent clusters divide the work: a unit is one row of the draws for one tile of samples.
//
// Units are numbered row by row, tile after tile, and cluster j of C takes [j U / C, (j + 1) U / C) of all U. So no
// cluster has more than one unit more than another, whatever the sizes, and none waits for a second wave. Every f is
// written once by one block: no result depends on C.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <ptx/cluster.cuh>

namespace fastscore {

// Where a cluster is in its share. `Samples` are a block's; blocks of a cluster have neighbouring ones.
struct Unit {
  int row, tile, left;

  __device__ __forceinline__ Unit(const Steps& p, int samples) {
    const int blocks = ptx::cluster_size(), cluster = blockIdx.x / blocks;
    const int64_t tiles = (p.batch + samples * blocks - 1) / (samples * blocks), units = tiles * p.rows;
    const int64_t first = units * cluster / p.clusters, end = units * (cluster + 1) / p.clusters;
    tile = static_cast<int>(first / p.rows);
    row = static_cast<int>(first - static_cast<int64_t>(tile) * p.rows);
    left = static_cast<int>(end - first);
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
