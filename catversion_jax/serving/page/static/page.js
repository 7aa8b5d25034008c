// What the page does beside htmx: send photos that are dropped, show a slider's value.
"use strict";

const PLAIN = /[^A-Za-z0-9._-]+/g;

function photoName(file, index) {
  const name = file.name.replace(PLAIN, "-").replace(/^[^A-Za-z0-9]+/, "").slice(-60);
  return name || `photo-${index}`;
}

// x.mask.png and x-masklabel.png are masks of the photo x, as in folders that are trained from.
const MASK = /^(.+)(-masklabel|\.mask)\.[A-Za-z0-9]+$/i;

async function send(zone, files) {
  const say = document.getElementById("upload-state");
  const problems = [];
  const names = new Map();
  const base = `/v1/concepts/${zone.dataset.concept}`;
  const photos = files.filter((file) => !MASK.test(file.name));
  const masks = files.filter((file) => MASK.test(file.name));
  let index = 0;
  for (const file of [...photos, ...masks]) {
    index += 1;
    say.textContent = `Sending ${file.name} (${index} of ${files.length}) ...`;
    let url = null;
    const mask = MASK.exec(file.name);
    if (mask === null) {
      const name = photoName(file, index);
      names.set(file.name.replace(/\.[^.]*$/, ""), name);
      url = `${base}/photos/${name}`;
    } else if (names.has(mask[1])) {
      url = `${base}/masks/${names.get(mask[1])}`;
    } else {
      problems.push(`${file.name}: a mask, and its photo ${mask[1]} is not among these files.`);
      continue;
    }
    try {
      const answer = await fetch(url, { method: "PUT", body: file });
      if (!answer.ok) {
        const said = await answer.json();
        problems.push(`${file.name}: ${said.error.message}`);
      }
    } catch (error) {
      problems.push(`${file.name}: the server cannot be reached.`);
    }
  }
  say.textContent = problems.length ? problems.join("\n") : `${files.length} sent.`;
  say.classList.toggle("wrong", problems.length > 0);
  htmx.trigger(document.body, "photos-changed");
}

document.addEventListener("change", (event) => {
  if (event.target.id === "photo-input") {
    const zone = event.target.closest("[data-concept]");
    send(zone, [...event.target.files]).then(() => { event.target.value = ""; });
  }
});

document.addEventListener("input", (event) => {
  const output = event.target.dataset && document.getElementById(event.target.dataset.shows);
  if (output) {
    output.textContent = Number(event.target.value).toFixed(2);
    const box = document.getElementById(event.target.dataset.uses);
    if (box) box.checked = true;
  }
});

for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    const zone = event.target.closest && event.target.closest("[data-concept]");
    if (name !== "dragleave") event.preventDefault();
    if (!zone) return;
    zone.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) {
      send(zone, [...event.dataTransfer.files]);
    }
  });
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest && event.target.closest("[data-delete-photo]");
  if (!button) return;
  await fetch(button.dataset.deletePhoto, { method: "DELETE" });
  htmx.trigger(document.body, "photos-changed");
});

// On a phone the pictures are below the form.
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.target.id === "drawn") {
    event.target.firstElementChild.scrollIntoView({ block: "nearest" });
  }
});

document.addEventListener("htmx:sseMessage", (event) => {
  if (event.detail.type === "end") window.location.reload();
});
