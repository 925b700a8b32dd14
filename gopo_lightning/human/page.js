
"use strict";
// Texts come from a language model: they enter the page as textContent alone.

const at = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const POLL_MS = 1500;

let state = null; // what the server knows: rater, groups with their status, …
let group = null; // what is shown
let order = []; // of {number, text, cut, letter, tied}, the best first
let good = 0; // how many of them stand above the line
let chosen = 0; // which of them the keys move
let undos = [];
let touched = false;
let isBusy = false;

// ---------------------------------------------------------------- server

async function ask(path, message) {
  const options = message && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(message),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("There is no answer: the command that serves this page has ended, or is not reached.");
  }
  const body = await answer.json();
  if (!answer.ok) {
    const error = new Error(body.error);
    error.isGone = answer.status === 409;
    throw error;
  }
  return body;
}

function complain(text) {
  at("problem").textContent = text;
  at("problem").hidden = false;
}

/** One thing at a time: what is pressed meanwhile is meant for what is gone. */
async function attempt(work, otherwise = "") {
  if (isBusy) return;
  isBusy = true;
  try {
    at("problem").hidden = true;
    await work();
  } catch (error) {
    complain(otherwise + error.message);
    if (error.isGone) await begin();
  }
  isBusy = false;
}

async function begin() {
  try {
    state = await ask("state");
    at("problem").hidden = true;
    await next();
  } catch (error) {
    complain(error.message);
    setTimeout(begin, 2 * POLL_MS);
  }
}

async function next(after = -1) {
  const { groups } = state;
  const later = [...groups.keys()].map((n) => (after + 1 + n) % groups.length);
  const found = later.find((n) => groups[n].status === "open");
  if (found === undefined) showRest();
  else await show(groups[found].key);
}

async function show(key) {
  group = await ask(`groups/${key}`);
  order = group.completions.map((completion, n) => ({
    ...completion,
    letter: LETTERS[n] ?? `no. ${n + 1}`,
    tied: group.ties[n] ?? false,
  }));
  good = group.good ?? order.length;
  [chosen, undos, touched] = [0, [], group.good !== null];
  at("prompt").replaceChildren(...group.prompt.map(turn));
  at("cards").replaceChildren();
  at("rest").hidden = true;
  at("ranking").hidden = false;
  draw();
  window.scrollTo(0, 0);
  at("prompt").scrollTop = 0;
}

const place = () => (group ? state.groups.findIndex(({ key }) => key === group.key) : state.groups.length);

async function save() {
  if (!touched) {
    touched = true;
    return say("You have changed nothing. Enter again keeps this order.", true);
  }
  await attempt(async () => {
    const ties = order.map(({ tied }, n) => n > 0 && tied);
    const from = place();
    state = await ask("rank", { key: group.key, order: order.map(({ number }) => number), ties, good });
    say("Saved.");
    await next(from);
  }, "Not saved. ");
}

const skip = () =>
  attempt(async () => {
    const from = place();
    state = await ask("skip", { key: group.key });
    say("Skipped.");
    await next(from);
  });

const back = () =>
  attempt(async () => {
    const before = place() - 1;
    if (before >= 0) await show(state.groups[before].key);
  });

const reopen = () =>
  attempt(async () => {
    state = await ask("reopen", {});
    await next();
  });

// ---------------------------------------------------------------- the order

function change(edit) {
  const before = JSON.stringify({ order, good, chosen });
  edit();
  order.forEach((item, n) => (item.tied &&= n > 0));
  touched = true;
  if (before === JSON.stringify({ order, good, chosen })) return;
  undos.push(before);
  draw();
}

function undo() {
  if (!undos.length) return;
  ({ order, good, chosen } = JSON.parse(undos.pop()));
  draw();
  say("Undone.");
}

/** Take the item at `from` out, put it at `to` of the rest; a tie that it leaves or lands in stays one of the others. */
function move(from, to, isGood) {
  const item = order[from];
  const follower = order[from + 1];
  if (follower && !item.tied) follower.tied = false;
  order.splice(from, 1);
  good -= from < good;
  item.tied = order[to]?.tied ?? false;
  order.splice(to, 0, item);
  good += isGood;
  chosen = to;
}

function step(by) {
  const n = chosen;
  change(() => {
    if (by > 0 && n === good - 1 && good < order.length) good -= 1; // past the line
    else if (by < 0 && n === good) good += 1;
    else if (n + by >= 0 && n + by < order.length) move(n, n + by, n < good);
  });
  announce();
}

function moveTo(to) {
  if (to >= order.length) return;
  change(() => move(chosen, to, to < good || good === order.length));
  announce();
}

function tie() {
  if (chosen === 0 || chosen >= good) {
    return say(chosen === 0 ? "There is none above the first." : "Those below the line tie already.", true);
  }
  change(() => (order[chosen].tied = !order[chosen].tied));
  announce();
}

function noneFrom(n) {
  change(() => (good = good === n ? order.length : n));
  say(good === order.length ? "No line." : good ? "None is good from here on." : "None is good.");
}

function choose(n) {
  chosen = Math.max(0, Math.min(order.length - 1, n));
  draw();
}

/** 1 for the best; those that tie share a rank; null below the line. */
function ranks() {
  let rank = 0;
  return order.map(({ tied }, n) => (n >= good ? null : (rank += n === 0 || !tied)));
}

// ---------------------------------------------------------------- drawing

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function textOf(text) {
  const element = make("div", text ? "text" : "text empty", text || "(empty)");
  element.dir = "auto";
  return element;
}

function turn({ role, text }) {
  const element = make("div", "turn");
  element.classList.toggle(["assistant", "system"].includes(role) ? role : "user", true);
  if (group.prompt.length > 1) element.append(make("div", "role", role));
  element.append(textOf(text));
  return element;
}

function button(label, sign, act) {
  const element = make("button", "", sign);
  element.type = "button";
  element.tabIndex = -1;
  element.title = label;
  element.setAttribute("aria-label", label);
  element.addEventListener("click", act);
  return element;
}

function card(item) {
  const element = make("div", "card");
  element.id = `card-${item.number}`;
  element.setAttribute("role", "listitem");
  const handle = make("div", "handle");
  handle.append(make("span", "rank"), make("span", "grip", "⋮⋮"));
  handle.title = "Drag";
  const body = make("div", "body");
  const notes = make("div", "notes");
  notes.append(make("b", "", item.letter));
  if (item.cut) notes.append(make("span", "", "cut off at the token limit"));
  notes.append(make("span", "tie", ""));
  const text = textOf(item.text);
  const more = make("button", "more", "Show all of it");
  more.type = "button";
  more.hidden = true;
  more.addEventListener("click", () => expand(index(item)));
  body.append(notes, text, more);
  const tools = make("div", "tools");
  const mine = (act) => () => {
    choose(index(item));
    act();
  };
  tools.append(
    button(`Move ${item.letter} up`, "↑", mine(() => step(-1))),
    button(`${item.letter} ties with the one above`, "=", mine(tie)),
    button(`Move ${item.letter} down`, "↓", mine(() => step(1))),
  );
  element.append(handle, body, tools);
  element.addEventListener("focus", () => index(item) !== chosen && choose(index(item)));
  element.addEventListener("click", () => index(item) !== chosen && choose(index(item)));
  handle.addEventListener("pointerdown", (event) => drag(event, item, element));
  return element;
}

const index = (item) => order.findIndex(({ number }) => number === item.number);

function line() {
  const element = make("div", "line", good ? "none below is good" : "none is good");
  element.id = "line";
  element.setAttribute("role", "separator");
  return element;
}

function draw() {
  const list = at("cards");
  const before = new Map([...list.children].map((child) => [child.id, child.getBoundingClientRect().top]));
  const rank = ranks();
  const elements = order.map((item, n) => {
    const element = at(`card-${item.number}`) ?? card(item);
    const tied = n > 0 && item.tied && n < good;
    element.className = ["card", n >= good && "bad", tied && "tied", n === chosen && "chosen"].filter(Boolean).join(" ");
    element.classList.toggle("open", Boolean(item.open));
    element.classList.toggle("dragged", dragged === item.number);
    element.querySelector(".rank").textContent = rank[n] ?? "–";
    element.querySelector(".tie").textContent = tied ? "ties with the one above" : "";
    element.tabIndex = n === chosen ? 0 : -1;
    const where = rank[n] === null ? "not good" : `rank ${rank[n]}${tied ? ", ties with the one above" : ""}`;
    element.setAttribute("aria-label", `Completion ${item.letter}, ${where}, ${n + 1} of ${order.length}`);
    return element;
  });
  const shown = good < order.length ? elements.toSpliced(good, 0, at("line") ?? line()) : elements;
  if (good < order.length) shown[good].textContent = good ? "none below is good" : "none is good";
  // Moving a node takes the focus from it, so only those move that have to.
  [...list.children].filter((child) => !shown.includes(child)).forEach((child) => child.remove());
  shown.forEach((element, n) => list.children[n] !== element && list.insertBefore(element, list.children[n] ?? null));
  for (const element of elements) {
    const text = element.querySelector(".text");
    const more = element.querySelector(".more");
    more.hidden = !element.classList.contains("open") && text.scrollHeight <= text.clientHeight + 1;
    more.textContent = element.classList.contains("open") ? "Show less" : "Show all of it";
  }
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
    for (const element of shown) {
      const by = before.get(element.id) - element.getBoundingClientRect().top;
      if (by) element.animate([{ transform: `translateY(${by}px)` }, { transform: "none" }], 120);
    }
  }
  if (dragged === null && document.activeElement !== elements[chosen]) {
    elements[chosen].focus({ preventScroll: true });
    elements[chosen].scrollIntoView({ block: "nearest" });
  }
  at("undo").disabled = !undos.length;
  at("back").disabled = place() === 0;
  at("none").setAttribute("aria-pressed", String(good === 0));
  frame();
}

function frame() {
  const total = state.groups.length;
  const done = state.groups.filter(({ status }) => status === "done").length;
  const where = group ? `prompt ${place() + 1} of ${total}, ` : "";
  at("count").textContent = `${where}${done} ranked · ${state.rater}`;
  at("progress").max = Math.max(total, 1);
  at("progress").value = done;
  document.title = `${done}/${total} ranked`;
}

function expand(n) {
  order[n].open = !order[n].open;
  draw();
}

function showRest() {
  group = null;
  const skipped = state.groups.filter(({ status }) => status === "skipped").length;
  const total = state.groups.length;
  at("ranking").hidden = true;
  at("rest").hidden = false;
  at("rest-title").textContent = state.live ? "Waiting for the next rollout" : skipped ? "That was the last one" : "All ranked";
  at("rest-text").textContent = state.live
    ? "The policy learns from your order, and writes anew. This page goes on by itself."
    : `${total - skipped} of ${total} prompts are ranked${skipped ? `, ${skipped} skipped` : ""}, in ${state.file}`;
  at("summary").textContent = state.summary;
  at("reopen").hidden = !skipped || state.live;
  at("last").hidden = !total || state.live;
  frame();
  if (state.live) setTimeout(begin, POLL_MS);
}

function say(text, isShown = false) {
  at("said").textContent = text;
  if (isShown) complain(text);
  else at("problem").hidden = true;
}

const announce = () => say(at("cards").querySelector(".chosen").getAttribute("aria-label"));

// ---------------------------------------------------------------- drag

let dragged = null;

function drag(event, item, element) {
  if (event.button !== 0) return;
  event.preventDefault();
  const before = JSON.stringify({ order, good, chosen });
  const follow = ({ clientY }) => {
    const list = at("cards");
    const others = [...list.children].filter((child) => child !== element);
    const y = clientY - list.getBoundingClientRect().top + list.offsetTop; // as offsetTop, which no animation moves
    const passed = others.filter((child) => y > child.offsetTop + child.offsetHeight / 2);
    const to = passed.filter((child) => child.id !== "line").length;
    const isGood = !others.includes(at("line")) || !passed.includes(at("line"));
    const from = index(item);
    if (to === from && isGood === from < good) return;
    move(from, to, isGood);
    order.forEach((other, n) => (other.tied &&= n > 0));
    draw();
  };
  const end = () => {
    dragged = null;
    removeEventListener("pointermove", follow);
    removeEventListener("pointerup", end);
    removeEventListener("pointercancel", end);
    if (JSON.stringify({ order, good, chosen }) !== before) {
      undos.push(before);
      touched = true;
      announce();
    }
    draw();
  };
  dragged = item.number;
  choose(index(item));
  addEventListener("pointermove", follow);
  addEventListener("pointerup", end);
  addEventListener("pointercancel", end);
}

// ---------------------------------------------------------------- keys

const KEYS = {
  ArrowUp: (event) => (event.shiftKey ? step(-1) : choose(chosen - 1)),
  ArrowDown: (event) => (event.shiftKey ? step(1) : choose(chosen + 1)),
  Home: () => choose(0),
  End: () => choose(order.length - 1),
  t: tie,
  n: () => noneFrom(chosen),
  x: () => noneFrom(0),
  e: () => expand(chosen),
  u: undo,
  s: skip,
  b: back,
  Enter: save,
};

addEventListener("keydown", (event) => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.altKey || event.ctrlKey || event.metaKey) {
    if (key === "z" && !event.altKey && group) {
      event.preventDefault();
      undo();
    }
    return;
  }
  if (key === "Enter" && event.target.closest("button")) return;
  if (isBusy) return;
  if (!group) {
    if (key === "b" && !at("rest").hidden && !at("last").hidden) back();
    return;
  }
  const act = KEYS[key] ?? (/^[0-9]$/.test(key) ? () => moveTo((Number(key) + 9) % 10) : null);
  if (!act || event.repeat && ["Enter", "s", "b"].includes(key)) return;
  event.preventDefault();
  act(event);
});

const BUTTONS = { back, undo, skip, none: () => noneFrom(0), save, reopen, last: back };
for (const [id, act] of Object.entries(BUTTONS)) at(id).addEventListener("click", act);
addEventListener("resize", () => group && draw());
begin();
