/* Seconds of one allreduce of BYTES bytes of floats, for knl.scaling.smpi: run on simulated nodes. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

int main(int count_arguments, char **arguments)
{
  MPI_Init(&count_arguments, &arguments);
  if (count_arguments < 2)
    MPI_Abort(MPI_COMM_WORLD, 2);
  int count = (int)(atol(arguments[1]) / (long)sizeof(float));
  /* Nobody looks at the sums: all simulated ranks share the pages of one buffer. */
  float *from = SMPI_SHARED_MALLOC((size_t)count * sizeof(float));
  float *to = SMPI_SHARED_MALLOC((size_t)count * sizeof(float));
  int rank;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Barrier(MPI_COMM_WORLD);
  double began = MPI_Wtime(), mine, slowest;
  MPI_Allreduce(from, to, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  mine = MPI_Wtime() - began;
  MPI_Reduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
  if (rank == 0)
    printf("%.9f\n", slowest);
  SMPI_SHARED_FREE(from);
  SMPI_SHARED_FREE(to);
  MPI_Finalize();
  return 0;
}
