"""The one error of a build."""


class ImageError(Exception):
    """Why there is no image; the text follows "cannot build the image: "."""
