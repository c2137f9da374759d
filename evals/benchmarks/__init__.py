"""The benchmarks, one file each: official files read, questions asked, answers graded."""
