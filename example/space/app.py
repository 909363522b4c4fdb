"""The demo as a Hugging Face Space: copy this folder into a Space with the SDK `gradio`."""

from elastic import ElasticTokenizer
from elastic.cli.demo_page import build, example_files

page = build(ElasticTokenizer.from_pretrained("small-fsq"), examples=example_files())

if __name__ == "__main__":
    page.launch(max_file_size="100mb", show_error=True)
