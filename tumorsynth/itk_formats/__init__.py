"""NRRD, MetaImage and DICOM series, read and written by SimpleITK (extra `itk`)."""
