const MOST_BYTES = 20 * 1024 * 1024;

function send(file) {
  if (!file) return;
  if (file.size > MOST_BYTES) {
    const problem = element.querySelector(".problem");
    problem.textContent = file.name + " is larger than 20 MB; give a smaller image";
    return;
  }
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { name: file.name, data: reader.result.split(",")[1] || "" });
  reader.readAsDataURL(file);
}

element.addEventListener("change", (event) => {
  if (event.target.type === "file") send(event.target.files[0]);
});
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => {
  event.preventDefault();
  if (element.querySelector(".drop")) send(event.dataTransfer.files[0]);
});
element.addEventListener("click", (event) => {
  const tile = event.target.closest("[data-row]");
  if (tile) trigger("select", { row: Number(tile.dataset.row) });
});
