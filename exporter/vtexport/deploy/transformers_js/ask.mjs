// Asks one question about one image: node ask.mjs photo.png "what is shown?"
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { AutoProcessor, LlavaForConditionalGeneration, RawImage, env } from '@huggingface/transformers';

const folder = path.dirname(fileURLToPath(import.meta.url));
env.allowRemoteModels = false;

const [photo, question] = process.argv.slice(2);
if (!question) {
  console.error('usage: node ask.mjs photo.png "what is shown?"');
  process.exit(2);
}
const processor = await AutoProcessor.from_pretrained(folder);
const model = await LlavaForConditionalGeneration.from_pretrained(folder);
const messages = [{ role: 'user', content: [{ type: 'image' }, { type: 'text', text: question }] }];
const prompt = processor.apply_chat_template(messages, { add_generation_prompt: true });
const inputs = await processor(await RawImage.read(photo), prompt);
const output = await model.generate({ ...inputs, do_sample: false, max_new_tokens: 64 });
const answer = output.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(answer, { skip_special_tokens: true })[0].trim());
