"""Text that ships with the package; LICENSE-PSF.txt says where it is from."""
