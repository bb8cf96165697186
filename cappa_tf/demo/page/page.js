"use strict";

// Requests sent at a time; the server puts those that wait into batches.
const AT_ONCE = 8;
const MOST_LABELS_SHOWN = 10;
const TINY = 130; // pixels of the longer side; such an image is not a photo
const SMALL = 320; // pixels; such a photo is enlarged
const SAMPLERS = {
  greedy: "Greedy",
  beam: "Beam search",
  top_p: "Sampling",
};
const UNITS = {
  "log-likelihood in nats": (score) => score.toFixed(2),
  cosine: (score) => score.toFixed(3),
  probability: (score) => percent(score),
};

const $ = (id) => document.getElementById(id);
const cards = [];
let about = null;
let round = 0; // A newer one makes the answers of an older one void.

// -- Elements ----------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role" || key === "scope") {
      made.setAttribute(key, value);
    } else {
      made[key] = value;
    }
  }
  made.append(...children);
  return made;
}

function percent(probability) {
  const value = 100 * probability;
  return value < 1 && value > 0 ? "<1%" : `${Math.round(value)}%`;
}

function say(text) {
  $("status").textContent = text;
}

// -- Controls ----------------------------------------------------------------

function showControls() {
  document.title = `CapPa demo: ${about.name}`;
  $("model").textContent = about.name;
  const { caption, prompt, rank } = about;
  $("decoding").hidden = !caption;
  if (caption) {
    for (const name of caption.samplers) {
      $("sampler").append(new Option(SAMPLERS[name], name));
    }
    $("sampler").disabled = caption.samplers.length < 2;
  }
  if (prompt) {
    $("prompt-field").hidden = false;
    $("prompt").required = prompt.required;
    for (const template of prompt.templates.filter(Boolean)) {
      const [before] = template.split("{question}");
      const button = element("button", { type: "button" }, template);
      button.addEventListener("click", () => {
        $("prompt").value = before;
        $("prompt").focus();
      });
      $("templates").append(button);
    }
    const plain = prompt.templates.find((one) => !one.includes("{question}"));
    $("prompt").value = plain ?? "";
  }
  $("examples").hidden = !about.examples.length;
  $("ranking").hidden = !rank?.labels;
  $("template").value = rank?.template ?? "{}";
  if (caption?.words) {
    $("legend").textContent =
      "Below each word its probability in percent, red to green." +
      (caption.attention
        ? " Point at a word, focus or tap it: the image is red where the " +
          "decoder attended while it predicted the word."
        : "");
  }
  showOptions();
}

function showOptions() {
  const chosen = $("sampler").value;
  for (const one of document.querySelectorAll("[data-for]")) {
    one.hidden = !one.dataset.for.split(" ").includes(chosen);
  }
}

function options(name) {
  const number = (id) => Number($(id).value);
  const sampler = $("sampler").value || "greedy";
  const found = {
    name: name.slice(-200),
    prompt: $("prompt").value,
    sampler,
    template: $("template").value || "{}",
    labels: labels(),
  };
  if (sampler === "beam") {
    found.sampling = { beams: number("beams") };
    found.num_captions = Math.min(number("num_captions"), number("beams"));
  } else if (sampler === "top_p") {
    found.sampling = {
      temperature: number("temperature"),
      top_p: number("top_p"),
    };
    found.num_captions = number("num_captions");
    found.seed = number("seed");
  }
  return found;
}

function labels() {
  const lines = $("labels").value.split("\n").map((line) => line.trim());
  return [...new Set(lines.filter(Boolean))];
}

function ranks() {
  return about.rank && (!about.rank.labels || labels().length > 0);
}

// -- Images ------------------------------------------------------------------

function add(files) {
  const added = about === null ? [] : [...files].map(makeCard);
  cards.push(...added);
  $("cards").append(...added.map((card) => card.item));
  if (added.length) {
    if (matchMedia("(max-width: 62rem)").matches) {
      $("status").scrollIntoView(); // It is below the form.
    }
    run(added);
  }
}

function makeCard(file) {
  const name = file.name || "pasted image";
  const photo = element("img", { className: "photo", alt: name });
  const heat = element("img", { className: "heat", alt: "", hidden: true });
  const frame = element("div", { className: "frame" }, photo, heat);
  const body = element("div", { className: "body" });
  const remove = element(
    "button",
    { type: "button", className: "remove", "aria-label": `Remove ${name}` },
    "×",
  );
  const item = element(
    "li",
    { className: "card" },
    element("div", { className: "picture" }, frame),
    remove,
    body,
  );
  const card = { file, name, photo, heat, frame, body, item, pinned: null };
  // Browsers do not show some kinds of images that the model reads.
  card.shown = new Promise((resolve) => {
    photo.onload = () => resolve(true);
    photo.onerror = () => resolve(false);
  });
  photo.addEventListener("error", () => (frame.hidden = true));
  photo.addEventListener("load", () => {
    const { naturalWidth, naturalHeight } = photo;
    const side = Math.max(naturalWidth, naturalHeight);
    photo.classList.toggle("tiny", side <= TINY);
    if (side <= SMALL) {
      photo.style.width = `${(16 * naturalWidth) / naturalHeight}rem`;
    }
    frame.hidden = false;
  });
  photo.src = URL.createObjectURL(file);
  remove.addEventListener("click", () => drop(card));
  return card;
}

function drop(card) {
  const place = cards.indexOf(card);
  cards.splice(place, 1);
  URL.revokeObjectURL(card.photo.src);
  card.item.remove();
  say(`Removed ${card.name}.`);
  // The keyboard goes on from the next image.
  const next = cards[Math.min(place, cards.length - 1)];
  (next?.item.querySelector(".remove") ?? $("files")).focus();
  $("legend").hidden = !cards.length || !$("legend").textContent;
}

async function addExamples() {
  const fetched = about.examples.map(async (name, i) => {
    const response = await fetch(`example/${i}`);
    const image = await response.blob();
    return new File([image], name, { type: image.type });
  });
  add(await Promise.all(fetched));
}

// -- Answers -----------------------------------------------------------------

async function run(some) {
  // All images are of the newest options, new ones join them.
  const own = some === cards ? ++round : round;
  const waiting = [...some];
  let failed = 0;
  say(`Working on ${images(waiting.length)} …`);
  $("legend").hidden = !$("legend").textContent;
  for (const card of waiting) {
    look(card, null);
    card.body.replaceChildren(
      element("h2", {}, card.name),
      element("p", { className: "waiting" }, "…"),
    );
  }
  const work = async () => {
    while (waiting.length && own === round) {
      const card = waiting.shift();
      if (!cards.includes(card)) {
        continue; // It was removed.
      }
      const fine = await answer(card, own);
      failed += fine ? 0 : 1;
    }
  };
  const count = waiting.length;
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (own === round && count) {
    const lost = failed ? `; ${images(failed)} without an answer` : "";
    say(`Done: ${images(count)}${lost}.`);
  }
}

function images(count) {
  return count === 1 ? "1 image" : `${count} images`;
}

async function answer(card, own) {
  const parts = [element("h2", {}, card.name)];
  let fine = true;
  try {
    if (card.file.size > about.max_bytes) {
      throw new Error(
        `The file is larger than ${about.max_bytes / 1e6} MB`,
      );
    }
    const preview = !(await card.shown);
    if (about.caption) {
      const found = await ask("caption", card, preview);
      showPreview(card, found);
      place(card.heat, found.part);
      parts.push(captionList(card, found.captions));
    }
    if (ranks()) {
      const found = await ask("rank", card, preview && !about.caption);
      showPreview(card, found);
      parts.push(rankTable(found));
    } else if (!about.caption) {
      parts.push(
        element("p", { className: "waiting" }, "Type labels to rank them."),
      );
    }
  } catch (error) {
    fine = false;
    parts.push(element("p", { className: "error" }, error.message));
  }
  if (own === round) {
    card.body.replaceChildren(...parts);
  }
  return fine;
}

async function ask(path, card, preview) {
  const asked = { ...options(card.name), preview };
  const body = new Blob([JSON.stringify(asked), "\n", card.file]);
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body,
    });
  } catch {
    throw new Error("The demo does not answer: is it still running?");
  }
  const found = await response.json().catch(() => ({}));
  if (!response.ok) {
    throw new Error(found.error ?? `The demo answers ${response.status}`);
  }
  return found;
}

function showPreview(card, found) {
  if (found.preview) {
    card.photo.src = found.preview;
  }
}

function place(heat, part) {
  const [left, top, width, height] = part ?? [0, 0, 1, 1];
  Object.assign(heat.style, {
    left: `${100 * left}%`,
    top: `${100 * top}%`,
    width: `${100 * width}%`,
    height: `${100 * height}%`,
  });
}

function captionList(card, captions) {
  const list = element("ol", { className: "captions" });
  for (const found of captions) {
    const text = found.caption || "(empty caption)";
    const words = found.words?.length
      ? wordGroup(card, text, found.words)
      : element("p", { className: "text" }, text);
    let fine = `log-likelihood ${found.log_likelihood.toFixed(2)}`;
    if (found.words) {
      fine +=
        found.end === null
          ? ", cut at the maximum length"
          : `, end of the caption ${percent(found.end)}`;
    }
    list.append(
      element("li", {}, words, element("p", { className: "fine" }, fine)),
    );
  }
  return list;
}

function wordGroup(card, text, words) {
  const group = element("div", {
    className: "words",
    role: "group",
    "aria-label": `Caption: ${text}`,
  });
  const buttons = words.map(({ word, probability, color, heat }, i) => {
    const button = element(
      "button",
      {
        type: "button",
        className: "word",
        "aria-label": `${word}, ${percent(probability)}`,
        "aria-pressed": "false",
        // One stop of the Tab key for a caption, arrows inside of it.
        tabIndex: i ? -1 : 0,
      },
      element("span", {}, word),
      element("small", {}, percent(probability)),
    );
    button.style.backgroundColor = color;
    const show = () => look(card, { button, heat });
    button.addEventListener("mouseenter", show);
    button.addEventListener("mouseleave", () => look(card, card.pinned));
    button.addEventListener("focus", () => {
      show();
      for (const other of buttons) {
        other.tabIndex = other === button ? 0 : -1;
      }
    });
    button.addEventListener("blur", () => look(card, card.pinned));
    button.addEventListener("click", () => {
      pin(card, card.pinned?.button === button ? null : { button, heat });
    });
    button.addEventListener("keydown", (event) => {
      const moves = {
        ArrowRight: i + 1,
        ArrowDown: i + 1,
        ArrowLeft: i - 1,
        ArrowUp: i - 1,
        Home: 0,
        End: buttons.length - 1,
      };
      if (event.key === "Escape") {
        pin(card, null);
      } else if (event.key in moves) {
        event.preventDefault();
        buttons[moves[event.key]]?.focus();
      }
    });
    return button;
  });
  group.append(...buttons);
  return group;
}

function pin(card, word) {
  card.pinned?.button.setAttribute("aria-pressed", "false");
  card.pinned = word;
  word?.button.setAttribute("aria-pressed", "true");
  look(card, word);
}

// Shows the attention for a word over the photo, or the photo alone.
function look(card, word) {
  if (word === null) {
    card.pinned = null;
  }
  for (const other of card.body.querySelectorAll(".word.active")) {
    other.classList.remove("active");
  }
  word?.button.classList.add("active");
  const heat = word?.heat ?? null;
  card.frame.classList.toggle("looking", heat !== null);
  card.heat.hidden = heat === null;
  if (heat !== null) {
    card.heat.src = heat;
  } else {
    card.heat.removeAttribute("src");
  }
}

function rankTable(found) {
  const shown = found.labels.slice(0, MOST_LABELS_SHOWN);
  const rows = shown.map(({ label, score, share }) => {
    const bar = element("div");
    bar.style.width = `${100 * share}%`;
    return element(
      "tr",
      {},
      element("th", { scope: "row" }, label),
      element("td", { className: "bar", "aria-hidden": "true" }, bar),
      element("td", {}, UNITS[found.kind](score)),
    );
  });
  const left = found.labels.length - shown.length;
  return element(
    "table",
    {},
    element(
      "caption",
      {},
      `Labels by ${found.kind}${left > 0 ? `, the best ${shown.length}` : ""}`,
    ),
    element("tbody", {}, ...rows),
  );
}

// -- Events ------------------------------------------------------------------

$("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = ""; // The same file can be chosen again.
});
$("sampler").addEventListener("change", showOptions);
$("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (cards.length) {
    run(cards);
  } else {
    say("Choose an image first.");
    $("files").focus();
  }
});
$("more").addEventListener("click", () => {
  $("seed").value = Number($("seed").value) + 1;
  $("controls").requestSubmit();
});
$("examples").addEventListener("click", () => {
  addExamples().catch(() => say("The demo does not answer."));
});
$("clear").addEventListener("click", () => {
  round += 1;
  for (const card of [...cards]) {
    drop(card);
  }
  say("All images are removed.");
  $("files").focus();
});
document.addEventListener("paste", (event) => add(event.clipboardData.files));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) {
    document.body.classList.remove("dragging");
  }
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  add(event.dataTransfer.files);
});

fetch("about")
  .then((response) => response.json())
  .then((found) => {
    about = found;
    $("files").disabled = false;
    showControls();
    say("Choose an image to begin.");
  })
  .catch(() => say("The demo does not answer: is it still running?"));
