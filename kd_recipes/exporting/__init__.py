"""What end devices load: files of a finished student, each compared with it by the program that will read it."""
