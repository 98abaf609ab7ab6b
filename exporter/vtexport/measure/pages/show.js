"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("stage");
  const views = [...document.querySelectorAll(".view")];
  const rows = [...document.querySelectorAll("#fate tbody tr")];
  const scored = document.querySelectorAll("#fate thead th").length === 4;

  const turnTo = (moment) => {
    for (const group of document.querySelectorAll(".moment")) {
      group.classList.toggle("on", Number(group.dataset.moment) === moment);
    }
    for (const row of document.querySelectorAll("#stages tbody tr")) {
      if (Number(row.dataset.moment) === moment) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
    const { name, tokens, recycled } = data.moments[moment];
    const now = document.getElementById("now");
    const strong = document.createElement("strong");
    const value = document.createElement("data");
    strong.textContent = name;
    value.value = value.textContent = String(tokens);
    const merged = recycled ? `, ${recycled} of them merged` : "";
    now.replaceChildren(strong, " ", value, ` of ${data.moments[0].tokens} visual tokens${merged}`);
    slider.setAttribute("aria-valuetext", now.textContent);
  };

  // What became of a patch in a stage, given its states before and behind it.
  const fate = (before, after) => {
    if (before === "-") return "not part of the image";
    if (before === "d") return "";
    if (after === "k") return "kept";
    if (after === "m") return before === "m" ? "in a merged token" : "merged";
    return before === "m" ? "dropped, as merged" : "dropped";
  };

  const choose = (view, row, column) => {
    const place = row * data.grid + column;
    const { states, scores, ranks } = data.views[view];
    for (const svg of views) {
      const cursor = svg.querySelector(".cursor");
      const here = Number(svg.dataset.view) === view;
      cursor.setAttribute("visibility", here ? "visible" : "hidden");
      if (here) {
        cursor.setAttribute("x", column);
        cursor.setAttribute("y", row);
      }
    }
    const title = `Row ${row + 1}, column ${column + 1}`;
    document.getElementById("where").textContent = views.length > 1 ? `View ${view + 1}, ${title.toLowerCase()}` : title;
    rows.forEach((line, number) => {
      const moment = number + 1;
      const cells = line.querySelectorAll("td");
      cells[cells.length - 1].textContent = fate(states[moment - 1][place], states[moment][place]);
      if (!scored) return;
      const score = scores[moment] ? scores[moment][place] : null;
      cells[0].textContent = score === null ? "" : String(score);
      cells[1].textContent = score === null ? "" : `${ranks[moment][place]} of ${data.moments[moment].rated}`;
    });
    document.getElementById("hint").hidden = true;
    document.getElementById("fate").hidden = rows.length === 0;
  };

  const last = data.grid - 1;
  const within = (number) => Math.min(Math.max(number, 0), last);
  for (const svg of views) {
    const view = Number(svg.dataset.view);
    let at = [0, 0];
    const move = (row, column) => {
      at = [within(row), within(column)];
      choose(view, ...at);
    };
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      move(
        Math.floor(((event.clientY - box.top) / box.height) * data.grid),
        Math.floor(((event.clientX - box.left) / box.width) * data.grid),
      );
    };
    svg.setAttribute("role", "application");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("aria-label", `${svg.getAttribute("aria-label")}. Arrow keys go from patch to patch.`);
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("focus", () => {
      if (svg.matches(":focus-visible")) move(...at);
    });
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -last], End: [0, last] };
      const step = steps[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      move(at[0] + step[0], at[1] + step[1]);
    });
  }

  slider.addEventListener("input", () => turnTo(Number(slider.value)));
  document.querySelector(".readout").hidden = false;
  if (data.moments.length > 1) document.querySelector(".control").hidden = false;
  // A reloaded page may come back with the slider where it was.
  turnTo(Number(slider.value));
})();
