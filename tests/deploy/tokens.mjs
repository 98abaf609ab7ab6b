// Answers questions about images with transformers.js: node tokens.mjs '[["photo.png", "what is shown?"]]' 12
// prints a list of token ids for each pair.
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from '@huggingface/transformers';

const folder = path.dirname(fileURLToPath(import.meta.url));
env.allowRemoteModels = false;
const processor = await AutoProcessor.from_pretrained(folder);
const model = await AutoModelForImageTextToText.from_pretrained(folder);
const answers = [];
for (const [photo, question] of JSON.parse(process.argv[2])) {
  const messages = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: question }] }];
  const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
  const inputs = await processor(await RawImage.read(photo), prompt);
  const output = await model.generate({ ...inputs, do_sample: false, max_new_tokens: Number(process.argv[3]) });
  answers.push(output.tolist()[0].slice(inputs.input_ids.dims.at(-1)).map(Number));
}
console.log(JSON.stringify(answers));
